"""Rules of linear algebra: batch dims pass, the dims of the problem itself stay whole."""

import dataclasses

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


@rule("cholesky", "cholesky_update", "eig", "eigh", "geqrf", "hessenberg", "lu")
@rule("householder_product", "qr", "schur", "svd", "tridiagonal")
def decomposition(op: Op) -> FactorRule:
    return batched(op, core=2)


@rule("ormqr")
def ormqr(op: Op) -> FactorRule:
    """`q c` or `c q`: the dim of c that q does not touch passes."""
    return _solved(op, 2, free=-1 if op.params["left"] else -2)


@rule("triangular_solve")
def triangular_solve(op: Op) -> FactorRule:
    """One system for each column of b (row, on the right side): these pass."""
    return _solved(op, 1, free=-1 if op.params["left_side"] else -2)


@rule("tridiagonal_solve")
def tridiagonal_solve(op: Op) -> FactorRule:
    return _solved(op, 3, free=-1, core=1)


def _solved(op: Op, rhs: int, free: int, core: int = 2) -> FactorRule:
    """As `batched`; linear in operand `rhs`, which shares the dim `free` with the result."""
    made = batched(op, core, linear=((rhs,),))
    (factor,), (same,) = made.ins[rhs][free], made.outs[0][free]
    kinds = tuple("pass" if f == factor else kind for f, kind in enumerate(made.kinds))
    out = tuple((factor,) if fs == (same,) else fs for fs in made.outs[0])
    return dataclasses.replace(made, outs=(out,), kinds=kinds)


@rule("symmetric_product")
def symmetric_product(op: Op) -> FactorRule:
    """`alpha a a^T + beta c`; the inner dim of a is summed if there is no c to be counted twice."""
    made = batched(op, core=2)
    (inner,) = made.ins[0][-1]
    kind = "whole" if op.params["beta"] else "sum"
    return dataclasses.replace(made, kinds=(*made.kinds[:inner], kind, *made.kinds[inner + 1 :]))


@rule("lu_pivots_to_permutation")
def lu_pivots_to_permutation(op: Op) -> FactorRule:
    return batched(op, core=1)
