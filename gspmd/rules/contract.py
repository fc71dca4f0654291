"""Rules of contractions: matrix products, ragged products, convolutions."""

from gspmd.ir import Op
from gspmd.rules.factor import Dims, FactorRule, Factors, gathered, rule


@rule("dot_general")
def dot_general(op: Op) -> FactorRule:
    """Batch, contracting and free dims, in the results' order: batch, free of lhs, free of rhs."""
    lhs, rhs = op.ins
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = op.params["dimension_numbers"]
    f = Factors()
    left: dict[int, int] = {d: f.new(lhs.shape[d]) for d in lhs_batch}
    right = {e: left[d] for d, e in zip(lhs_batch, rhs_batch, strict=True)}
    free_left = [d for d in range(len(lhs.shape)) if d not in (*lhs_batch, *lhs_contract)]
    free_right = [d for d in range(len(rhs.shape)) if d not in (*rhs_batch, *rhs_contract)]
    left |= {d: f.new(lhs.shape[d]) for d in free_left}
    right |= {d: f.new(rhs.shape[d]) for d in free_right}
    for d, e in zip(lhs_contract, rhs_contract, strict=True):
        left[d] = right[e] = f.new(lhs.shape[d], "sum")
    out = [left[d] for d in (*lhs_batch, *free_left)] + [right[d] for d in free_right]
    return f.rule(
        [_in_order(left), _in_order(right)],
        [tuple((factor,) for factor in out)],
        linear=((0,), (1,)),
        forward=1,
        backward=1,
    )


def _in_order(factors: dict[int, int]) -> Dims:
    return tuple((factors[d],) for d in range(len(factors)))


@rule("ragged_dot_general")
def ragged_dot_general(op: Op) -> FactorRule:
    """`m k, g k n -> m n`: rows of m belong to the group g; m and g stay whole.

    Only this mode, the ragged dim being a free dim of lhs and the sizes of the groups one vector.
    """
    lhs, rhs, sizes = op.ins
    numbers = op.params["ragged_dot_dimension_numbers"]
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = numbers.dot_dimension_numbers
    ragged, groups = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    if {*ragged} & {*lhs_contract, *lhs_batch} or len(sizes.shape) != 1:
        return gathered(op)
    f = Factors()
    left: dict[int, int] = {d: f.new(lhs.shape[d]) for d in lhs_batch}
    right = {e: left[d] for d, e in zip(lhs_batch, rhs_batch, strict=True)}
    for d, e in zip(lhs_contract, rhs_contract, strict=True):
        left[d] = right[e] = f.new(lhs.shape[d], "sum")
    free_left = [d for d in range(len(lhs.shape)) if d not in left]
    free_right = [d for d in range(len(rhs.shape)) if d not in right and d not in groups]
    left |= {d: f.new(lhs.shape[d], "whole" if d in ragged else "pass") for d in free_left}
    right |= {d: f.new(rhs.shape[d]) for d in free_right}
    right |= {d: f.new(rhs.shape[d], "whole") for d in groups}
    out = [left[d] for d in (*lhs_batch, *free_left)] + [right[d] for d in free_right]
    return f.rule(
        [_in_order(left), _in_order(right), f.dims(sizes.shape, "whole")],
        [tuple((factor,) for factor in out)],
        linear=((0,), (1,)),
        forward=1,
        backward=1,
    )


@rule("conv_general_dilated")
def conv_general_dilated(op: Op) -> FactorRule:
    """Batch and output features pass, input features are summed, spatial dims stay whole.

    With feature groups only the batch passes, with batch groups nothing.
    """
    (lhs, rhs), (out,) = op.ins, op.outs
    numbers = op.params["dimension_numbers"]
    grouped = op.params["feature_group_count"] > 1
    batch_grouped = op.params["batch_group_count"] > 1
    f = Factors()
    left, right, result = (dict[int, int]() for _ in range(3))
    if not batch_grouped:
        left[numbers.lhs_spec[0]] = result[numbers.out_spec[0]] = f.new(out.shape[numbers.out_spec[0]])
    if not grouped and not batch_grouped:
        right[numbers.rhs_spec[0]] = result[numbers.out_spec[1]] = f.new(rhs.shape[numbers.rhs_spec[0]])
        left[numbers.lhs_spec[1]] = right[numbers.rhs_spec[1]] = f.new(
            lhs.shape[numbers.lhs_spec[1]], "sum"
        )
    for factors, shape in ((left, lhs.shape), (right, rhs.shape), (result, out.shape)):
        for d, n in enumerate(shape):
            if d not in factors:
                factors[d] = f.new(n, "whole")
    return f.rule(
        [_in_order(left), _in_order(right)],
        [_in_order(result)],
        linear=((0,), (1,)),
        forward=1,
        backward=1,
    )
