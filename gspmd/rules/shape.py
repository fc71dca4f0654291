"""Rules of data movement: broadcast, reshape, transpose, slicing with constants, iota."""

import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from gspmd.ir import Op
from gspmd.rules.factor import Dims, FactorRule, Factors, Split, gathered, rule


def tied(op: Op, whole: Collection[int], **options: Any) -> FactorRule:
    """All operands and results are split alike, except in the dims `whole`; scalars aside."""
    f = Factors()
    shape = max((x.shape for x in (*op.ins, *op.outs)), key=len)
    shared = {d: f.new(n) for d, n in enumerate(shape) if d not in whole}

    def dims(shape: Sequence[int]) -> Dims:
        return tuple(
            (shared[d] if d in shared else f.new(n, "whole"),) for d, n in enumerate(shape)
        )

    return f.rule([dims(x.shape) for x in op.ins], [dims(x.shape) for x in op.outs], **options)


def _result_shape(param: str) -> Callable[[Op, Split], dict[str, Any]]:
    """The hook for a param that names the shape of the result."""

    def params(op: Op, split: Split) -> dict[str, Any]:
        return {**op.params, param: split.out_shapes[0]}

    return params


@rule("broadcast_in_dim", params=_result_shape("shape"))
def broadcast_in_dim(op: Op) -> FactorRule:
    """Copied dims pass; new dims, and dims stretched from size 1, are the result's own."""
    f = Factors()
    shape = op.outs[0].shape
    out = f.dims(shape)
    operand: Dims = tuple(
        out[d] if n == shape[d] else ()
        for n, d in zip(op.ins[0].shape, op.params["broadcast_dimensions"], strict=True)
    )
    return f.rule([operand], [out], linear=((0,),), forward=3, backward=2)


@rule("transpose")
def transpose(op: Op) -> FactorRule:
    f = Factors()
    dims = f.dims(op.ins[0].shape)
    return f.rule([dims], [tuple(dims[d] for d in op.params["permutation"])], linear=((0,),))


@rule("squeeze")
def squeeze(op: Op) -> FactorRule:
    f = Factors()
    gone = op.params["dimensions"]
    dims: Dims = tuple(() if d in gone else (f.new(n),) for d, n in enumerate(op.ins[0].shape))
    return f.rule([dims], [tuple(x for x in dims if x)], linear=((0,),))


@rule("reshape", params=_result_shape("new_sizes"))
def reshape(op: Op) -> FactorRule:
    """Dims that split or merge share their factors: `(a b) c -> a (b c)`.

    Walks both shapes from the major end. While the sizes passed so far agree, the gcd of what is
    left of the two current dims is a factor of both; else dims stay whole until they agree again.
    """
    shape, new = op.ins[0].shape, op.outs[0].shape
    if 0 in shape:
        return gathered(op)
    f = Factors()
    order = op.params["dimensions"] or range(len(shape))  # in which the operand's dims are read
    ins, outs = _Walk([shape[d] for d in order]), _Walk(new)
    while ins.left or outs.left:
        common = math.gcd(ins.rest, outs.rest)
        if ins.passed == outs.passed and common > 1:
            factor = f.new(common)
            ins.take(factor, common)
            outs.take(factor, common)
        else:
            behind = ins if ins.left and (ins.passed <= outs.passed or not outs.left) else outs
            behind.take(f.new(behind.rest, "whole"), behind.rest)
    dims = dict(zip(order, ins.dims, strict=True))
    return f.rule([tuple(dims[d] for d in range(len(shape)))], [outs.dims], linear=((0,),))


class _Walk:
    """A position in a shape, from its major end: `rest` is what is left of the current dim.

    Dims of size 1 are passed over: they have no factor.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self.factors: list[list[int]] = [[] for _ in shape]
        self.todo = [(d, n) for d, n in reversed(list(enumerate(shape))) if n > 1]
        self.passed = 1

    @property
    def left(self) -> bool:
        return bool(self.todo)

    @property
    def rest(self) -> int:
        return self.todo[-1][1] if self.todo else 1

    @property
    def dims(self) -> Dims:
        return tuple(map(tuple, self.factors))

    def take(self, factor: int, size: int) -> None:
        dim, rest = self.todo.pop()
        self.factors[dim].append(factor)
        self.passed *= size
        if rest > size:
            self.todo.append((dim, rest // size))


@rule("stack")
def stack(op: Op) -> FactorRule:
    f = Factors()
    axis = op.params["axis"]
    dims = f.dims(op.ins[0].shape)
    out = (*dims[:axis], (f.new(len(op.ins), "whole"),), *dims[axis:])
    together = tuple(range(len(op.ins)))
    return f.rule([dims] * len(op.ins), [out], linear=(together,), forward=0, backward=1)


@rule("unstack")
def unstack(op: Op) -> FactorRule:
    f = Factors()
    axis = op.params["axis"]
    dims = f.dims(op.outs[0].shape)
    operand = (*dims[:axis], (f.new(len(op.outs), "whole"),), *dims[axis:])
    return f.rule([operand], [dims] * len(op.outs), linear=((0,),))


def _iota_call(op: Op, split: Split) -> Callable[..., Any]:
    dimension, shape = op.params["dimension"], split.out_shapes[0]
    axes = split.outs[0].dims[dimension]
    if not axes:
        assert op.call is not None
        return functools.partial(op.call, **{**op.params, "shape": shape})

    def local(**_: Any) -> Any:
        # Counted in integers: a bfloat16 sum of offset and position would round twice.
        offset = lax.axis_index(axes).astype(jnp.uint32) * shape[dimension]
        position = lax.broadcasted_iota(jnp.uint32, shape, dimension)
        return (offset + position).astype(op.params["dtype"])

    return local


@rule("iota", params=_result_shape("shape"), call=_iota_call)
def iota(op: Op) -> FactorRule:
    """Each device counts from where its shard begins."""
    f = Factors()
    return f.rule([()] * len(op.ins), [f.dims(op.outs[0].shape)])


@rule("empty", params=_result_shape("shape"))
def empty(op: Op) -> FactorRule:
    f = Factors()
    return f.rule([], [f.dims(op.outs[0].shape)])


@rule("empty2", "platform_index")
def scalar(_op: Op) -> FactorRule:
    """No operands, one scalar, the same on every device."""
    return Factors().rule([], [()])
