"""The rules of dynamic slices: a device gives what it holds of one, or writes what falls to it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from gspmd.ir import Op
from gspmd.local import as_words
from gspmd.rules.factor import Dims, FactorRule, Factors, Split, rule
from gspmd.rules.index import clamped, sum_kind, zeros_but
from gspmd.sharding import Axes


def _starts(starts: Sequence[Any], shape: Sequence[int], sizes: Sequence[int]) -> list[Any]:
    """The starts that keep a slice within the whole array, all of one type."""
    begin = [clamped(x, n - size) for x, n, size in zip(starts, shape, sizes, strict=True)]
    dtype = jnp.result_type(*begin)
    return [x.astype(dtype) for x in begin]


def _first(axes: Axes, block: int, like: Any) -> Any:
    """Where this device's block of a split dim begins."""
    return (lax.axis_index(axes) * block).astype(like.dtype) if axes else jnp.zeros_like(like)


def _rows(x: Any, start: Any, size: int, dim: int) -> Any:
    """Entries `start` to `start + size` of a dim; zeros past its ends."""
    n = x.shape[dim]
    start = jnp.clip(start, -size, n)
    if n == size == 1:
        return zeros_but(jnp.broadcast_to(start == 0, x.shape), x)
    widths = [(0, 0, 0)] * x.ndim
    widths[dim] = (size, size, 0)
    return lax.dynamic_slice_in_dim(
        lax.pad(x, jnp.zeros((), x.dtype), widths), start + size, size, dim
    )


# --- dynamic_slice


def _slice_params(op: Op, split: Split) -> dict[str, Any]:
    return {**op.params, "slice_sizes": split.out_shapes[0]}


def _slice_call(op: Op, split: Split) -> Callable[..., Any]:
    assert op.call is not None
    shape, sizes = op.ins[0].shape, op.params["slice_sizes"]
    held, made = split.ins[0].dims, split.out_shapes[0]
    cut = [d for d, n in enumerate(shape) if n != sizes[d] and (held[d] or split.outs[0].dims[d])]
    if not cut:
        return functools.partial(op.call, **_slice_params(op, split))

    def local(operand: Any, *starts: Any, **_: Any) -> Any:
        """Cuts the stretch of the shard that is nearest what is wanted, then moves it in place."""
        operand, restore = as_words(operand)
        begin = _starts(starts, shape, sizes)
        shift: dict[int, Any] = {}
        taken = list(made)
        for d in cut:
            block = operand.shape[d]
            taken[d] = min(made[d], block)
            wanted = begin[d] + _first(split.outs[0].dims[d], made[d], begin[d])
            wanted -= _first(held[d], block, begin[d])
            begin[d] = jnp.clip(wanted, 0, block - taken[d])
            shift[d] = wanted - begin[d]
        trailing = operand.ndim - len(begin)
        begin += [jnp.zeros_like(begin[0])] * trailing
        out = lax.dynamic_slice(operand, begin, (*taken, *operand.shape[len(taken) :]))
        for d in cut:
            out = _rows(out, shift[d], made[d], d)
        return restore(out)

    return local


@rule("dynamic_slice", params=_slice_params, call=_slice_call, picks=True)
def dynamic_slice(op: Op) -> FactorRule:
    """Dims taken in full pass. Of other dims the operand is summed, and the result may be split."""
    f = Factors()
    ins: list[tuple[int, ...]] = []
    outs: list[tuple[int, ...]] = []
    kind = sum_kind(op.ins[0].dtype)
    for n, size in zip(op.ins[0].shape, op.outs[0].shape, strict=True):
        ins.append((f.new(n, "pass" if size == n else kind if size else "whole"),))
        outs.append(ins[-1] if size == n else (f.new(size),))
    return f.rule(
        [tuple(ins), *[()] * len(op.ins[1:])],
        [tuple(outs)],
        linear=((0,),),
        forward=0,
        backward=1,
        masked=False,
    )


# --- dynamic_update_slice


def _update_call(op: Op, split: Split) -> Callable[..., Any]:
    assert op.call is not None
    call, held = op.call, split.ins[0].dims
    shape, sizes = op.ins[0].shape, op.ins[1].shape
    cut = [d for d, axes in enumerate(held) if axes and shape[d] != sizes[d]]
    if not cut:
        return call

    def local(operand: Any, update: Any, *starts: Any, **_: Any) -> Any:
        """Writes to the stretch of the shard that is nearest the update what of it falls there."""
        operand, restore = as_words(operand)
        update, _restore = as_words(update)
        begin = _starts(starts, shape, sizes)
        fall: dict[int, Any] = {}
        for d in cut:
            block = operand.shape[d]
            size = min(sizes[d], block)
            wanted = begin[d] - _first(held[d], block, begin[d])
            begin[d] = jnp.clip(wanted, 0, block - size)
            shift = begin[d] - wanted
            update = _rows(update, shift, size, d)
            row = shift + lax.iota(shift.dtype, size)
            fall[d] = (row >= 0) & (row < sizes[d])
        falls: Any = jnp.bool_(True)
        for d, here in fall.items():
            falls &= lax.broadcast_in_dim(here, update.shape, (d,))
        begin += [jnp.zeros_like(begin[0])] * (operand.ndim - len(begin))
        old = lax.dynamic_slice(operand, begin, update.shape)
        return restore(lax.dynamic_update_slice(operand, jnp.where(falls, update, old), begin))

    return local


@rule("dynamic_update_slice", call=_update_call)
def dynamic_update_slice(op: Op) -> FactorRule:
    """All dims of the operand pass; the update is whole where it is smaller than the operand."""
    f = Factors()
    operand, update = op.ins[:2]
    dims = f.dims(operand.shape)
    smaller: Dims = tuple(
        factor if n == m else (f.new(m, "whole"),)
        for n, m, factor in zip(operand.shape, update.shape, dims, strict=True)
    )
    copied = frozenset(d for (d,) in smaller if f.kinds[d] == "whole")
    ins = [dims, smaller, *[()] * len(op.ins[2:])]
    return f.rule(ins, [dims], copied=copied, linear=((0, 1),), forward=0, backward=1)
