"""Rules of ops that move stretches of a dim: slice, pad, concatenate, split, tile, rev.

A dim whose entries shift may stay split: each device gets of the others the stretch that it wants.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from gspmd.exchange import Runs, mine
from gspmd.ir import Literal, Op, Operand, Value
from gspmd.local import as_words
from gspmd.rules.build import Builder, resized, value
from gspmd.rules.factor import Dims, FactorRule, Factors, Split, rule
from gspmd.rules.index import sum_kind
from gspmd.sharding import Axes

FEW = 8
"""A slice of fewer entries is a sum over the devices, of which all but the owners have zeros."""


# --- slice


def _strides(op: Op) -> Sequence[int]:
    return op.params["strides"] or (1,) * len(op.ins[0].shape)


def _slice_params(op: Op, split: Split) -> dict[str, Any]:
    """Dims taken in full now end where the shard ends."""
    sizes = zip(op.ins[0].shape, op.outs[0].shape, split.in_shapes[0], strict=True)
    limits = tuple(
        local if n == m else limit
        for (n, m, local), limit in zip(sizes, op.params["limit_indices"], strict=True)
    )
    return {**op.params, "limit_indices": limits}


def _slice_call(op: Op, split: Split) -> Callable[..., Any]:
    assert op.call is not None
    call, params = op.call, _slice_params(op, split)
    own = _own_dims(op, split)
    if not own:
        return functools.partial(call, **params)

    def local(x: Any, **_: Any) -> Any:
        starts, limits = list(params["start_indices"]), list(params["limit_indices"])
        strides = list(_strides(op))
        for d, axes in own.items():
            x = _own_rows(x, d, axes, starts[d], strides[d], op.outs[0].shape[d])
            starts[d], limits[d], strides[d] = 0, x.shape[d], 1
        new = {"start_indices": starts, "limit_indices": limits, "strides": strides}
        return call(x, **{name: tuple(given) for name, given in new.items()})

    return local


def _own_dims(op: Op, split: Split) -> dict[int, Axes]:
    """The split dims that are summed: a device has zeros in place of what others hold."""
    held = zip(split.ins[0].dims, split.outs[0].dims, strict=True)
    return {d: axes for d, (axes, kept) in enumerate(held) if axes and not kept}


def _own_rows(x: Any, dim: int, axes: Axes, start: int, stride: int, size: int) -> Any:
    """Entries `start + j * stride` of a split dim, zeros where another device holds them."""
    x, restore = as_words(x)
    block = x.shape[dim]
    row = start + stride * lax.iota(np.int32, size) - lax.axis_index(axes) * block
    held = lax.broadcast_in_dim(
        (row >= 0) & (row < block), (*x.shape[:dim], size, *x.shape[dim + 1 :]), (dim,)
    )
    taken = jnp.take(x, jnp.clip(row, 0, block - 1), axis=dim)
    return restore(jnp.where(held, taken, np.zeros((), x.dtype)))


def _slice_partition(b: Builder, op: Op, split: Split, ins: Sequence[Operand]) -> Sequence[Value]:
    x = value(ins[0])
    params = _slice_params(op, split)
    starts, limits = list(params["start_indices"]), list(params["limit_indices"])
    strides = list(_strides(op))
    for d, axes in enumerate(split.outs[0].dims):
        if axes and op.ins[0].shape[d] != op.outs[0].shape[d]:
            x = _stretch(b, op, x, d, axes, split.out_shapes[0][d])
            starts[d], limits[d], strides[d] = 0, x.shape[d], 1
    if x.shape == split.out_shapes[0]:
        return [x]
    for d, axes in _own_dims(op, split).items():
        size = op.outs[0].shape[d]
        how = {"dim": d, "axes": axes, "start": starts[d], "stride": strides[d], "size": size}
        (x,) = b.local("own_rows", _own_rows, [x], [(resized(x, d, size), x.dtype)], **how)
        starts[d], limits[d], strides[d] = 0, size, 1
    done = {"start_indices": starts, "limit_indices": limits, "strides": strides}
    frozen = {key: tuple(x) for key, x in done.items()}
    assert op.call is not None
    return b.local("slice", op.call, [x], [(split.out_shapes[0], x.dtype)], **frozen)


def _stretch(b: Builder, op: Op, x: Value, dim: int, axes: Axes, size: int) -> Value:
    """The slice along one split dim, of which each device gets its `size` entries."""
    n, m = op.ins[0].shape[dim], op.outs[0].shape[dim]
    start, stride = op.params["start_indices"][dim], _strides(op)[dim]
    group = b.mesh.size(axes)
    have, want = Runs.blocks(n, group), Runs.blocks(m, group)
    if stride == 1:
        shifted = Runs.of(np.add(want.start, start), np.add(want.stop, start))
        return b.exchange([(x, have, (shifted,))], dim, axes, size)
    # Each device first drops what nobody wants. Entry j of the result is entry start + j * stride.
    first, last = (
        np.clip(-(-(np.asarray(at) - start) // stride), 0, m) for at in (have.start, have.stop)
    )
    at = start + first * stride - np.asarray(have.start)
    kept = max(1, int(np.max(last - first)))
    how = {"dim": dim, "axes": axes, "at": tuple(at.tolist()), "stride": stride, "size": kept}
    (x,) = b.local("thin", _thin, [x], [(resized(x, dim, kept), x.dtype)], **how)
    return b.exchange([(x, Runs.of(first, last), (want,))], dim, axes, size)


def _thin(x: Any, *, dim: int, axes: Axes, at: Sequence[int], stride: int, size: int) -> Any:
    """This device's entries `at[device]`, one in `stride`; anything past the end of the shard."""
    rows = mine(at, axes) + stride * lax.iota(np.int32, size)
    x, restore = as_words(x)
    return restore(jnp.take(x, rows, axis=dim, mode="clip"))


@rule("slice", params=_slice_params, call=_slice_call, partition=_slice_partition, picks=True)
def slice_(op: Op) -> FactorRule:
    """Dims taken in full pass. A few entries are summed, more are exchanged."""
    f = Factors()
    ins: list[tuple[int, ...]] = []
    outs: list[tuple[int, ...]] = []
    for n, m, stride in zip(op.ins[0].shape, op.outs[0].shape, _strides(op), strict=True):
        few = m < FEW and m * stride < n
        ins.append((f.new(n, sum_kind(op.ins[0].dtype) if few else "pass", m < n and not few),))
        outs.append((f.new(m, "whole"),) if few else ins[-1])
    return f.rule([tuple(ins)], [tuple(outs)], linear=((0,),), masked=False)


# --- pad


def _pad_partition(b: Builder, op: Op, split: Split, ins: Sequence[Operand]) -> Sequence[Value]:
    x, filler = value(ins[0]), ins[1]
    config = list(op.params["padding_config"])
    for d, axes in enumerate(split.outs[0].dims):
        low, _, interior = config[d]
        if not axes or config[d] == (0, 0, 0):
            continue
        size = split.out_shapes[0][d]
        n, group = op.ins[0].shape[d], b.mesh.size(axes)
        x = dilated(b, x, filler, d, axes, n, interior + 1, np.arange(group) * size - low, size)
        config[d] = (0, 0, 0)
    if all(sizes == (0, 0, 0) for sizes in config):
        return [x]
    assert op.call is not None
    out = (split.out_shapes[0], x.dtype)
    return b.local("pad", op.call, [x, filler], [out], padding_config=tuple(config))


@rule("pad", partition=_pad_partition)
def pad(op: Op) -> FactorRule:
    """Dims not padded pass, the others are exchanged. Padding with zeros is linear in operand 0."""
    f = Factors()
    padding = zip(op.ins[0].shape, op.params["padding_config"], strict=True)
    dims: Dims = tuple((f.new(n, exchanged=any(sizes)),) for n, sizes in padding)
    filler = op.ins[1]
    zero = isinstance(filler, Literal) and filler.value == 0
    return f.rule([dims, ()], [dims], linear=((0,),) if zero else ((0, 1),))


def dilated(
    b: Builder,
    x: Value,
    filler: Operand,
    dim: int,
    axes: Axes,
    n: int,
    step: int,
    start: np.ndarray,
    size: int,
) -> Value:
    """Positions `start[device]` to `start[device] + size` of a dim whose entries are `step` apart.

    `x` holds a block of the n entries; between, before and after them there are fillers.
    """
    have = Runs.blocks(n, b.mesh.size(axes))
    first, last = -(-start // step), -(-(start + size) // step)
    want = Runs.of(first, last)
    if step == 1:
        return b.exchange([(x, have, (want,))], dim, axes, size, filler)
    count = max(1, int(np.max(last - first)))
    x = b.exchange([(x, have, (want,))], dim, axes, count, filler)
    phase = tuple((first * step - start).tolist())
    how = {"dim": dim, "axes": axes, "phase": phase, "step": step, "size": size}
    return b.local("dilate", _dilate, [x, filler], [(resized(x, dim, size), x.dtype)], **how)[0]


def _dilate(
    x: Any, filler: Any, *, dim: int, axes: Axes, phase: Sequence[int], step: int, size: int
) -> Any:
    """A dim of `size` whose entries `phase[device]`, one in `step`, are those of `x`."""
    x, restore = as_words(x)
    at = mine(phase, axes)
    room = step - 1 if not isinstance(at, int) else at
    length = (x.shape[dim] - 1) * step + 1
    widths = [(0, 0, 0)] * x.ndim
    widths[dim] = (room, max(0, size + step - length), step - 1)
    x = lax.pad(x, filler, widths)
    start = room - at
    if isinstance(start, int):
        return restore(lax.slice_in_dim(x, start, start + size, axis=dim))
    return restore(lax.dynamic_slice_in_dim(x, start, size, dim))


# --- concatenate, split, tile, rev


Stretch = tuple[int, int, int]  # operand, first entry, past the last entry


def stretches_of(*xs: Any, dimension: int, stretches: Sequence[Stretch]) -> Any:
    """Stretches of a dim of the operands, side by side: what the op `splice` computes."""
    pieces = [lax.slice_in_dim(xs[i], first, last, axis=dimension) for i, first, last in stretches]
    return lax.concatenate(pieces, dimension)


def _stretches(op: Op) -> list[Stretch]:
    """What a dim is made of, in order: (operand, first entry, past the last entry)."""
    dim = op.params["dimension"]
    given = op.params.get("stretches")
    return list(given or ((i, 0, x.shape[dim]) for i, x in enumerate(op.ins)))


def _concatenate_partition(
    b: Builder, op: Op, split: Split, ins: Sequence[Operand]
) -> Sequence[Value]:
    dim = op.params["dimension"]
    return [spliced(b, op, split, ins, dim, _stretches(op))]


def spliced(
    b: Builder,
    op: Op,
    split: Split,
    ins: Sequence[Operand],
    dim: int,
    stretches: Sequence[Stretch],
) -> Value:
    """A split dim made of stretches of the operands: each device gets its block of it."""
    axes = split.outs[0].dims[dim]
    size, group = split.out_shapes[0][dim], b.mesh.size(axes)
    block = Runs.blocks(op.outs[0].shape[dim], group)
    wants: dict[int, list[Runs]] = {}
    offset = 0
    for i, first, last in stretches:
        length = last - first
        start = np.clip(np.asarray(block.start) - offset, 0, length)
        stop = np.clip(np.asarray(block.stop) - offset, 0, length)
        at = start + offset - np.asarray(block.start)
        wants.setdefault(i, []).append(Runs.of(start + first, stop + first, at))
        offset += length
    sources = [
        (value(ins[i]), Runs.blocks(op.ins[i].shape[dim], group), tuple(runs))
        for i, runs in wants.items()
    ]
    return b.exchange(sources, dim, axes, size)


@rule("concatenate", "splice", partition=_concatenate_partition)
def concatenate(op: Op) -> FactorRule:
    together = tuple(range(len(op.ins)))
    return shifted(op, {op.params["dimension"]}, linear=(together,), forward=0, backward=1)


def shifted(op: Op, dims: Collection[int], **options: Any) -> FactorRule:
    """All operands and results are split alike; in `dims` their entries shift."""
    f = Factors()
    shape = max((x.shape for x in op.ins), key=lambda s: max((s[d] for d in dims), default=0))
    shared: Dims = tuple((f.new(n, exchanged=d in dims),) for d, n in enumerate(shape))
    return f.rule([shared] * len(op.ins), [shared] * len(op.outs), **options)


def _tile_partition(b: Builder, op: Op, split: Split, ins: Sequence[Operand]) -> Sequence[Value]:
    x = value(ins[0])
    reps = list(op.params["reps"])
    for d, axes in enumerate(split.outs[0].dims):
        if axes and reps[d] > 1:
            n = op.ins[0].shape[d]
            x = spliced(b, op, split, [x], d, [(0, 0, n)] * reps[d])
            reps[d] = 1
    if all(rep == 1 for rep in reps):
        return [x]
    assert op.call is not None
    return b.local("tile", op.call, [x], [(split.out_shapes[0], x.dtype)], reps=tuple(reps))


@rule("tile", partition=_tile_partition)
def tile(op: Op) -> FactorRule:
    return shifted(op, {d for d, n in enumerate(op.params["reps"]) if n != 1}, linear=((0,),))


def _split_partition(b: Builder, op: Op, split: Split, ins: Sequence[Operand]) -> Sequence[Value]:
    x, dim = value(ins[0]), op.params["axis"]
    axes = split.ins[0].dims[dim]
    have = Runs.blocks(op.ins[0].shape[dim], b.mesh.size(axes))
    outs: list[Value] = []
    offset = 0
    for out, shape in zip(op.outs, split.out_shapes, strict=True):
        want = Runs.blocks(out.shape[dim], have.group)
        shifted = Runs.of(np.add(want.start, offset), np.add(want.stop, offset))
        outs.append(b.exchange([(x, have, (shifted,))], dim, axes, shape[dim]))
        offset += out.shape[dim]
    return outs


@rule("split", partition=_split_partition)
def split(op: Op) -> FactorRule:
    return shifted(op, {op.params["axis"]}, linear=((0,),))


def _rev_partition(b: Builder, op: Op, split: Split, ins: Sequence[Operand]) -> Sequence[Value]:
    x = value(ins[0])
    assert op.call is not None
    dimensions = tuple(op.params["dimensions"])
    (x,) = b.local("rev", op.call, [x], [(x.shape, x.dtype)], dimensions=dimensions)
    for d in dimensions:
        axes, n = split.ins[0].dims[d], op.ins[0].shape[d]
        if not axes:
            continue
        want = Runs.blocks(n, b.mesh.size(axes))
        # Reversed, a shard begins with its padding.
        start, stop = n - np.asarray(want.stop), n - np.asarray(want.start)
        have = Runs.of(start, stop, x.shape[d] - (stop - start))
        x = b.exchange([(x, have, (want,))], d, axes, x.shape[d])
    return [x]


@rule("rev", partition=_rev_partition)
def rev(op: Op) -> FactorRule:
    return shifted(op, op.params["dimensions"], linear=((0,),))
