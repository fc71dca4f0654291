"""Rules of contractions: matrix products, ragged products, convolutions."""

import math
from collections.abc import Sequence
from typing import Any

from gspmd.ir import Op
from gspmd.rules.factor import Dims, FactorRule, Factors, Product, gathered, rule
from gspmd.rules.pointwise import holds


def bilinear(op: Op) -> tuple[tuple[int, ...], ...]:
    """The operands in which a product is linear: those whose sums its results can hold.

    An int8 sum that is still owed may wrap around; in an int32 product it must not have.
    """
    result = op.outs[0].dtype
    return tuple(
        (i,) for i in (0, 1) if op.ins[i].dtype == result or holds(result, op.ins[i].dtype)
    )


def _dot(op: Op) -> Product:
    return _nest(op, op.params["dimension_numbers"])


def _nest(op: Op, numbers: Any, groups: Sequence[int] = ()) -> Product:
    """The sizes of a product; of `groups` of matrices on the right, each row meets one."""
    (contract, rhs_contract), (batch, rhs_batch) = numbers
    lhs, rhs = op.ins[0].shape, op.ins[1].shape
    return Product(
        math.prod(lhs[d] for d in batch),
        math.prod(n for d, n in enumerate(lhs) if d not in (*batch, *contract)),
        math.prod(n for d, n in enumerate(rhs) if d not in (*rhs_batch, *rhs_contract, *groups)),
        math.prod(lhs[d] for d in contract),
    )


@rule("dot_general", product=_dot)
def dot_general(op: Op) -> FactorRule:
    f = Factors()
    left, right, out = _product(f, op, op.params["dimension_numbers"])
    return f.rule([left, right], [out], linear=bilinear(op), forward=1, backward=1)


def _product(
    f: Factors, op: Op, numbers: Any, ragged: Sequence[int] = (), groups: Sequence[int] = ()
) -> tuple[Dims, Dims, Dims]:
    """The factors of lhs, of rhs, and of the result: batch dims, free dims of lhs, those of rhs.

    Dims `ragged` of lhs and `groups` of rhs, which are no dims of the result, stay whole.
    """
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = numbers
    lhs, rhs = op.ins[0].shape, op.ins[1].shape
    free_left = [d for d in range(len(lhs)) if d not in (*lhs_batch, *lhs_contract)]
    free_right = [d for d in range(len(rhs)) if d not in (*rhs_batch, *rhs_contract, *groups)]
    left = {d: f.new(lhs[d], "whole" if d in ragged else "pass") for d in (*lhs_batch, *free_left)}
    right = {e: left[d] for d, e in zip(lhs_batch, rhs_batch, strict=True)}
    right |= {d: f.new(rhs[d]) for d in free_right}
    right |= {d: f.new(rhs[d], "whole") for d in groups}
    for d, e in zip(lhs_contract, rhs_contract, strict=True):
        left[d] = right[e] = f.new(lhs[d], "whole" if d in ragged else "sum")
    out = [left[d] for d in (*lhs_batch, *free_left)] + [right[d] for d in free_right]
    return _in_order(left), _in_order(right), tuple((factor,) for factor in out)


def _in_order(factors: dict[int, int]) -> Dims:
    return tuple((factors[d],) for d in range(len(factors)))


@rule("scaled_dot", product=_dot)
def scaled_dot(op: Op) -> FactorRule:
    """`m (s b), n (s b), m s, n s -> m n`: a scale for each block of b.

    A block stays whole: JAX takes none of a single entry.
    """
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = op.params["dimension_numbers"]
    lhs, rhs, lhs_scale, rhs_scale = (x.shape for x in op.ins)
    f = Factors()
    left: dict[int, tuple[int, ...]] = {
        d: (f.new(n),) for d, n in enumerate(lhs) if d not in lhs_contract
    }
    right = {e: left[d] for d, e in zip(lhs_batch, rhs_batch, strict=True)}
    right |= {d: (f.new(n),) for d, n in enumerate(rhs) if d not in (*rhs_batch, *rhs_contract)}
    out = [left[d] for d in lhs_batch] + [left[d] for d in left if d not in lhs_batch]
    out += [right[d] for d in right if d not in rhs_batch]
    scales: tuple[dict[int, tuple[int, ...]], ...] = ({**left}, {**right})
    for d, e in zip(lhs_contract, rhs_contract, strict=True):
        counts = {lhs_scale[d], rhs_scale[e]} - {1}
        if len(counts) == 1:
            (count,) = counts
            inner = (f.new(count, "sum"), f.new(lhs[d] // count, "whole"))
        else:  # scales of one block, or of blocks that do not fall into pieces alike
            inner = (f.new(lhs[d], "whole" if counts else "sum"),)
        left[d] = right[e] = inner
        for scale, at, n in ((scales[0], d, lhs_scale[d]), (scales[1], e, rhs_scale[e])):
            scale[at] = () if n == 1 else inner[:1] if len(counts) == 1 else (f.new(n, "whole"),)
    ins = [tuple(dims[d] for d in sorted(dims)) for dims in (left, right, *scales)]
    return f.rule(ins, [tuple(out)], forward=1, backward=1)


def _ragged_dot(op: Op) -> Product:
    numbers = op.params["ragged_dot_dimension_numbers"]
    return _nest(op, numbers.dot_dimension_numbers, numbers.rhs_group_dimensions)


@rule("ragged_dot_general", product=_ragged_dot)
def ragged_dot_general(op: Op) -> FactorRule:
    """`m k, g k n -> m n`, each row of m multiplied with its group's matrix; m and g stay whole.

    Or `m k, k n -> g m n`, each group summing over its rows of k; k and g stay whole.
    """
    sizes = op.ins[2].shape
    numbers = op.params["ragged_dot_dimension_numbers"]
    (contract, _), (batch, _) = numbers.dot_dimension_numbers
    ragged, groups = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    if {*ragged} & {*batch} or len(sizes) != 1:
        return gathered(op)
    f = Factors()
    left, right, out = _product(f, op, numbers.dot_dimension_numbers, ragged, groups)
    group = f.dims(sizes, "whole")
    if {*ragged} & {*contract}:
        out = (*group, *out)
    return f.rule([left, right, group], [out], linear=bilinear(op), forward=1, backward=1)
