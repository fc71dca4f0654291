"""Rules of sorting and selection: the ordered dim stays whole, all others pass."""

from gspmd.ir import Op
from gspmd.rules.factor import Dims, FactorRule, Factors, rule


@rule("sort")
def sort(op: Op) -> FactorRule:
    f = Factors()
    dims: Dims = tuple(
        (f.new(n, "whole" if d == op.params["dimension"] else "pass"),)
        for d, n in enumerate(op.ins[0].shape)
    )
    return f.rule([dims] * len(op.ins), [dims] * len(op.outs), forward=1, backward=1)


def _selected(op: Op, axis: int) -> FactorRule:
    f = Factors()
    shape, out = op.ins[0].shape, op.outs[0].shape
    axis %= len(shape)
    dims: Dims = tuple((f.new(n, "whole" if d == axis else "pass"),) for d, n in enumerate(shape))
    kept: Dims = tuple(
        (f.new(out[d], "whole"),) if d == axis else factor for d, factor in enumerate(dims)
    )
    return f.rule([dims], [kept] * len(op.outs), forward=1, backward=1)


@rule("top_k")
def top_k(op: Op) -> FactorRule:
    return _selected(op, op.params["axis"])


@rule("approx_top_k")
def approx_top_k(op: Op) -> FactorRule:
    return _selected(op, op.params["reduction_dimension"])
