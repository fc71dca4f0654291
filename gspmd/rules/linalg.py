"""Rules of linear algebra and FFT: batch dims pass, the dims of the problem itself stay whole."""

from gspmd.ir import Op
from gspmd.rules.factor import FactorRule, Factors, rule


def batched(op: Op, core: int, linear: tuple[tuple[int, ...], ...] = ()) -> FactorRule:
    """The rule of an op on stacks of problems; operand 0 holds `core` dims for each of them.

    All operands and results lead with the same batch dims.
    """
    f = Factors()
    batch = f.dims(op.ins[0].shape[: len(op.ins[0].shape) - core])
    rank = len(batch)
    return f.rule(
        [(*batch, *f.dims(x.shape[rank:], "whole")) for x in op.ins],
        [(*batch, *f.dims(x.shape[rank:], "whole")) for x in op.outs],
        linear=linear,
        forward=1,
        backward=1,
    )


@rule("cholesky", "cholesky_update", "eig", "eigh", "geqp3", "geqrf", "hessenberg", "lu", "ormqr")
@rule("householder_product", "qr", "schur", "svd", "symmetric_product", "tridiagonal")
def decomposition(op: Op) -> FactorRule:
    return batched(op, core=2)


@rule("triangular_solve")
def triangular_solve(op: Op) -> FactorRule:
    return batched(op, core=2, linear=((1,),))


@rule("tridiagonal_solve")
def tridiagonal_solve(op: Op) -> FactorRule:
    return batched(op, core=1, linear=((3,),))


@rule("lu_pivots_to_permutation")
def lu_pivots_to_permutation(op: Op) -> FactorRule:
    return batched(op, core=1)


@rule("fft")
def fft(op: Op) -> FactorRule:
    return batched(op, core=len(op.params["fft_lengths"]), linear=((0,),))
