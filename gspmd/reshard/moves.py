"""Moves: what a device executes for each step of a reshard, its collectives and what is around.

Most steps are one collective between two shards. Where several axes change dims at once, the shard
is first cut into pieces, a leading dim of them, which the collectives send about and `join_pieces`
puts together again.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core.primitives import slice_p

from gspmd import local
from gspmd.collectives import result_shape
from gspmd.reshard import blocks
from gspmd.reshard.turns import Digits, Step, digits
from gspmd.sharding import Axes, Mesh, Sharding

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Made:
    """One op: `ins` are the numbers of its operands, 0 the shard that is there, i the i-th op.

    `call` is None for a collective. `shape` is that of the result.
    """

    name: str
    ins: tuple[int, ...]
    shape: Shape
    params: Mapping[str, Any]
    call: Callable[..., Any] | None = None


def lower(step: Step, shape: Shape, mesh: Mesh) -> list[Made]:
    """The ops of `step` for a tensor of logical `shape`; the last one gives the new shard."""
    writer = _Writer(step, shape, mesh)
    kind, dims = step.kind, _changed(step.src, step.dst)
    if kind == "collective_permute" or not step.moves:
        writer.permute()
    elif len(step.moves) > 1 or len(dims) > 2:
        writer.pieces()
    elif kind == "all_reduce":
        writer.collective(kind, axes=step.axes, reduction=step.src.reduction)
    elif kind == "slice":
        (dim,) = dims
        params = {"axes": step.axes, "dim": dim, "size": writer.shape[dim]}
        writer.local("shard", local.shard, writer.target, params)
    elif kind == "all_gather":
        (dim,) = dims
        writer.collective(kind, axes=step.axes, dim=dim)
    elif kind == "reduce_scatter" and len(dims) == 1:
        writer.pad(dims[0], writer.target[dims[0]] * mesh.size(step.axes))
        params = {"dim": dims[0], "reduction": step.src.reduction}
        writer.collective(kind, axes=step.axes, **params)
    elif kind == "all_to_all" and _tail(step, dims) is not None:
        source, target = _tail(step, dims) or (0, 0)
        writer.pad(target, writer.target[target] * mesh.size(step.axes))
        writer.collective(kind, axes=step.axes, split_dim=target, concat_dim=source)
    else:
        writer.pieces()
    writer.trim()
    return writer.ops


def _changed(src: Sharding, dst: Sharding) -> list[int]:
    return [i for i, (a, b) in enumerate(zip(src.dims, dst.dims, strict=True)) if a != b]


def _tail(step: Step, dims: Sequence[int]) -> tuple[int, int] | None:
    """From which dim to which the axes go, if they are listed alike in both."""
    source, target = sorted(dims, key=lambda i: len(step.dst.dims[i]) > len(step.src.dims[i]))
    gone = step.src.dims[source][len(step.dst.dims[source]) :]
    return (source, target) if gone == step.axes else None


class _Writer:
    """Collects the ops of one step; `shape` is that of the value at hand."""

    def __init__(self, step: Step, shape: Shape, mesh: Mesh) -> None:
        self.step, self.logical, self.mesh = step, shape, mesh
        self.ops: list[Made] = []
        self.shape = step.src.local_shape(shape, mesh)
        self.target = step.dst.local_shape(shape, mesh)

    def local(
        self,
        name: str,
        call: Callable[..., Any],
        shape: Shape,
        params: Mapping[str, Any],
        ins: tuple[int, ...] | None = None,
    ) -> int:
        """Appends a local op on the value at hand; its number."""
        self.ops.append(Made(name, ins or (len(self.ops),), shape, params, call))
        self.shape = shape
        return len(self.ops)

    def collective(self, name: str, **params: Any) -> int:
        """Appends a collective on the value at hand; its number."""
        shape = result_shape(name, self.shape, self.mesh.size(params["axes"]), params)
        self.ops.append(Made(name, (len(self.ops),), shape, params))
        self.shape = shape
        return len(self.ops)

    def pad(self, dim: int, size: int) -> None:
        if self.shape[dim] != size:
            shape = (*self.shape[:dim], size, *self.shape[dim + 1 :])
            self.local("pad_to", local.pad_to, shape, {"dim": dim, "size": size})

    def trim(self) -> None:
        if self.shape != self.target:
            starts = (0,) * len(self.target)
            limits = {"start_indices": starts, "limit_indices": self.target, "strides": None}
            self.local("slice", slice_p.bind, self.target, limits)

    def permute(self) -> None:
        step, size = self.step, self.mesh.size
        alike = all(size(a) == size(b) for a, b in zip(step.src.dims, step.dst.dims, strict=True))
        if alike and len(step.moves) == 1:
            src, dst = (
                (*side.axes, *(a for a in step.axes if a not in side.axes))
                for side in (step.src, step.dst)
            )
            self.ops.append(Made("collective_permute", (0,), self.target, {"src": src, "dst": dst}))
            self.shape = self.target
            return
        axes = blocks.group_axes(self.mesh, step.src, step.dst)
        rounds = blocks.rounds(self.logical, self.mesh, step.src, step.dst)
        numbers: list[int] = []
        held = self.shape
        for this in rounds:
            number = 0
            if this.size != held:
                params = {"axes": axes, "at": this.cut, "size": this.size}
                number = self.local("cut_block", blocks.cut_block, this.size, params, (0,))
            if this.pairs:
                params = {"axes": axes, "pairs": this.pairs}
                self.ops.append(Made("collective_permute", (number,), this.size, params))
                number = len(self.ops)
            numbers.append(number)
        params = {"axes": axes, "size": self.target, "rounds": rounds}
        ins = tuple(numbers) or (0,)
        self.local("join_blocks", blocks.join_blocks, self.target, params, ins)

    def pieces(self) -> None:
        """Any turn between shardings that nest, on pieces in a leading dim."""
        step, size = self.step, self.mesh.size
        extra = step.extra or ((),) * len(self.target)
        by_kind = {move.kind: move.axes for move in step.moves}
        summed, moved, gathered = (
            by_kind.get(kind, ()) for kind in ("reduce_scatter", "all_to_all", "all_gather")
        )
        every = digits(step.src, step.dst, extra)
        split = tuple(d[len(a) :] for d, a in zip(every, step.src.dims, strict=True))
        joined = tuple(d[len(b) :] for d, b in zip(every, step.dst.dims, strict=True))
        piece = tuple(-(-n // size(axes)) for n, axes in zip(self.shape, split, strict=True))
        front = summed + moved
        params = {"split": split, "front": front, "piece": piece}
        self.local("cut_pieces", cut_pieces, (size(front), *piece), params)
        if summed:
            reduction = step.src.reduction
            self.collective("reduce_scatter", axes=summed, dim=0, reduction=reduction)
        if left := by_kind.get("all_reduce"):
            self.collective("all_reduce", axes=left, reduction=step.src.reduction)
        if moved:
            self.collective("all_to_all", axes=moved, split_dim=0, concat_dim=0)
        if gathered:
            self.collective("all_gather", axes=gathered, dim=0)
        shape = tuple(n * size(axes) for n, axes in zip(piece, joined, strict=True))
        back = gathered + moved
        self.local("join_pieces", join_pieces, shape, {"joined": joined, "back": back})


# --- on a device


def cut_pieces(x: jax.Array, *, split: Digits, front: Axes, piece: Shape) -> jax.Array:
    """`[pieces, *piece]`: for each device along `front` its own, in that order.

    Each dim is cut along the axes `split` of it, major first; of those that are not in `front`,
    this device takes its own part.
    """
    x, restore = local.as_words(x)
    trailing = x.shape[len(piece) :]  # the words of a PRNG key
    names: list[str] = []
    sizes: list[int] = []
    widths: list[tuple[int, int, int]] = []
    for n, block, axes in zip(x.shape, piece, split, strict=False):
        widths.append((0, block * math.prod(map(lax.axis_size, axes)) - n, 0))
        names += [*axes, ""]
        sizes += [*map(lax.axis_size, axes), block]
    x = lax.pad(x, x.dtype.type(0), [*widths, *((0, 0, 0) for _ in trailing)])
    x = x.reshape(*sizes, *trailing)
    for i in reversed(range(len(names))):
        if names[i] and names[i] not in front:
            x = lax.dynamic_index_in_dim(x, lax.axis_index(names[i]), i, keepdims=False)
            del names[i]
    order = [names.index(axis) for axis in front]
    order += [i for i in range(x.ndim) if i not in order]
    count = math.prod(map(lax.axis_size, front))
    return restore(x.transpose(order).reshape(count, *piece, *trailing))


def join_pieces(x: jax.Array, *, joined: Digits, back: Axes) -> jax.Array:
    """One block of `[pieces, *piece]`, where the pieces come from the devices along `back`.

    Each dim is put together along the axes `joined` of it, major first.
    """
    x, restore = local.as_words(x)
    piece, trailing = x.shape[1 : len(joined) + 1], x.shape[len(joined) + 1 :]
    x = x.reshape(*map(lax.axis_size, back), *piece, *trailing)
    order: list[int] = []
    shape: list[int] = []
    for i, (n, axes) in enumerate(zip(piece, joined, strict=True)):
        order += [*map(back.index, axes), len(back) + i]
        shape.append(n * math.prod(map(lax.axis_size, axes)))
    order += range(len(back) + len(piece), x.ndim)
    return restore(x.transpose(order).reshape(*shape, *trailing))
