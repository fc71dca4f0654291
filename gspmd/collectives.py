"""The table of collectives: what each moves, what it gives, and how JAX spells it.

Four back ends run the same program: the three platforms of real devices, inside `jax.shard_map`,
and "simulated", inside nested `jax.vmap`. `FORMS` says which form of each collective they keep.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gspmd.ir import Op, bytes_of
from gspmd.local import as_words, neutral_value
from gspmd.sharding import Axes, Mesh

Backend = Literal["tpu", "gpu", "cpu", "simulated"]
Shape = tuple[int, ...]
When = Callable[[Shape, int, Any], bool]
"""Of one device's part of an array: from its shape, the dim that is split, and the dtype."""


def _never(part: Shape, dim: int, dtype: Any) -> bool:
    return False


def _not_in_order(part: Shape, dim: int, dtype: Any) -> bool:
    """Whether the parts do not follow one another in memory."""
    return dim > 0


def _breaks_tiles(part: Shape, dim: int, dtype: Any) -> bool:
    """Whether a part is no whole number of a TPU's tiles: 8 rows of 128 lanes of 4 bytes.

    Any dim but the last may become that of the rows.
    """
    return _bytes_along(part, dim, dtype) % (512 if dim == len(part) - 1 else 32) > 0


def _thinner_than_rows(part: Shape, dim: int, dtype: Any) -> bool:
    """Whether a part is thinner than a TPU's tiles have rows, and yet a whole number of them."""
    return _bytes_along(part, dim, dtype) % 32 > 0 and math.prod(part) % 1024 == 0


def _bytes_along(part: Shape, dim: int, dtype: Any) -> int:
    return part[dim] * jax.dtypes.itemsize_bits(dtype) // 8


@dataclasses.dataclass(frozen=True, slots=True)
class Forms:
    """How a back end wants its collectives.

    Where `gather_first` or `scatter_first` say so, the devices' parts lie one behind the other in
    the first dim while they travel, and are moved from or to their dim on the device; elsewhere
    they travel as JAX's tiled form has it. Where `scatter_rows` does, they travel so in rows
    of 128 entries, whatever their shape. With `one_message`, the operands of one collective
    travel as one array. `many_axes` says that every collective takes several axes at once.
    """

    gather_first: When = _never
    scatter_first: When = _never
    scatter_rows: When = _never
    one_message: bool = False
    many_axes: bool = True


FORMS: Mapping[Backend, Forms] = {
    # The compiler makes an all-reduce and a slice, at twice the bytes, of a reduce-scatter whose
    # parts are no whole tiles: bf16[16,256,8192] over 64, in parts of 128. Along the first dim, it
    # stays one; so it does with the parts as a dim of their own, but only behind a product. An
    # all-gather stays what it is in any form. It combines all-reduces itself, the others not.
    # Parts 8 wide of bf16 are padded to 128 in that form, 16 times their size, and in a loop become
    # an all-reduce again: bf16[65536,8192] over 1024 sends twice the bytes. In rows of 128 it
    # stayed what it is in every case tried, for a copy of the operand.
    "tpu": Forms(scatter_first=_breaks_tiles, scatter_rows=_thinner_than_rows),
    "gpu": Forms(),  # not measured
    # XLA moves single entries until the parts follow one another; ours moves rows. 8 devices, 4 MB
    # each: a gather along dim 2 in parts of 128 takes 16 ms in place of 45, a scatter 8 ms in place
    # of 41; the same along the first dim. Each operand of a collective waits anew for all devices,
    # 150 us; eight of 8 KB take 1.4 ms, as one array 0.6 ms, and eight of 64 KB 2.4 and 2.1.
    "cpu": Forms(gather_first=_not_in_order, scatter_first=_not_in_order, one_message=True),
    # Under vmap `all_gather`, `psum_scatter` and `ppermute` take one axis: a collective over
    # several is a sequence of collectives over one.
    "simulated": Forms(many_axes=False),
}
"""The form that each back end keeps; measured with JAX 0.10.2 and libtpu 0.0.42."""


@dataclasses.dataclass(frozen=True, slots=True)
class Collective:
    """One row of the table.

    `wire` is what one device of a group of n sends, per byte of its operand. `result` is the local
    shape of a result, from the local shape of its operand, n and the op's params. `lower` runs it.
    """

    name: str
    wire: Callable[[int], float]
    result: Callable[[Shape, int, Mapping[str, Any]], Shape]
    lower: Callable[..., tuple[jax.Array, ...]]


def is_collective(name: str) -> bool:
    """Whether ops called `name` communicate."""
    return name in TABLE


def wire_bytes(kind: str, group: int, operand_bytes: float) -> float:
    """Bytes that one device of a group of `group` devices sends, once."""
    return TABLE[kind].wire(group) * operand_bytes if group > 1 else 0.0


def axes_of(op: Op) -> Axes:
    """The mesh axes along which the collective `op` communicates."""
    return op.params["axes"] if "axes" in op.params else op.params["src"]


def pairs_of(op: Op, mesh: Mesh) -> Sequence[tuple[int, int]]:
    """Sender and receiver of the `collective_permute` `op`, by their index along `axes_of(op)`."""
    if "pairs" in op.params:
        return op.params["pairs"]
    src, dst = op.params["src"], op.params["dst"]
    return _reordered(src, src, dst, [mesh.size((axis,)) for axis in src])


def _reordered(axes: Axes, src: Axes, dst: Axes, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Who has a block where the blocks are in the order of `src`, and who where in that of `dst`.

    Devices are numbered along `axes`, which have `sizes`.
    """
    device = np.arange(np.prod(sizes)).reshape(sizes)
    senders, receivers = (
        device.transpose([axes.index(axis) for axis in order]).ravel().tolist()
        for order in (src, dst)
    )
    return list(zip(senders, receivers, strict=True))


def sent_by(op: Op, mesh: Mesh) -> float:
    """Bytes that one device sends when the collective `op` of a local program runs once."""
    return wire_bytes(op.name, mesh.size(axes_of(op)), bytes_of(op.ins))


def result_shape(kind: str, shape: Shape, group: int, params: Mapping[str, Any]) -> Shape:
    """Local shape of the result for an operand of local `shape`."""
    return TABLE[kind].result(tuple(shape), group, params)


def backend_of(platform: str) -> Backend:
    """The back end of a device's `platform`; one that nobody has measured is taken for a GPU."""
    return platform if platform in ("tpu", "gpu", "cpu") else "gpu"


def lower(op: Op, args: Sequence[jax.Array], backend: Backend) -> tuple[jax.Array, ...]:
    """The results of the collective `op` on this device's `args`, in terms of `jax.lax`.

    Several operands share their `axes`; a gather or scatter of several has a `dim` for each.
    """
    return TABLE[op.name].lower(*args, backend=backend, **op.params)


def _each(dim: int | Sequence[int], xs: Sequence[jax.Array]) -> list[tuple[jax.Array, int]]:
    """The operands, each with its own dim."""
    return list(zip(xs, [dim] * len(xs) if isinstance(dim, int) else dim, strict=True))


def _in_one_message(backend: Backend, xs: Sequence[jax.Array]) -> bool:
    """Whether `xs` travel as one array, which has one dtype and something in it."""
    alike = len({x.dtype for x in xs}) == 1 and all(x.size for x in xs)
    return FORMS[backend].one_message and len(xs) > 1 and alike


def _together(
    rows: Sequence[jax.Array], travel: Callable[[jax.Array], jax.Array]
) -> Sequence[jax.Array]:
    """`travel` of each of `rows`, which lie side by side in their last dim on the way."""
    widths = [row.shape[-1] for row in rows]
    return lax.split(travel(jnp.concatenate(rows, -1)), widths, -1)


def _all_gather(
    *xs: jax.Array, backend: Backend, axes: Axes, dim: int | Sequence[int]
) -> tuple[jax.Array, ...]:
    carried = [_as_bytes(x) for x in xs]
    each = _each(dim, [x for x, _ in carried])
    if _in_one_message(backend, xs):
        rows = [x.ravel() for x, _ in each]
        stacks = _together(rows, lambda row: lax.all_gather(row, axes))
        wholes = [
            _from_first(stack.reshape(lax.axis_size(axes), *x.shape), dim)
            for stack, (x, dim) in zip(stacks, each, strict=True)
        ]
    else:
        wholes = [_gather(x, backend, axes, dim) for x, dim in each]
    return tuple(restore(x) for x, (_, restore) in zip(wholes, carried, strict=True))


def _gather(x: jax.Array, backend: Backend, axes: Axes, dim: int) -> jax.Array:
    forms = FORMS[backend]
    shape = _scaled(x.shape, dim, lax.axis_size(axes), 1)
    if 0 in shape:  # XLA refuses to gather along a dim of size 0
        return jnp.zeros(shape, x.dtype)
    if forms.gather_first(x.shape, dim, x.dtype):
        return _from_first(lax.all_gather(x, axes), dim)
    # One axis at a time, the minor one goes first: its shards are neighbours in the result.
    for group in [axes] if forms.many_axes else reversed(axes):
        x = lax.all_gather(x, group, axis=dim, tiled=True)
    return x


def _from_first(stack: jax.Array, dim: int) -> jax.Array:
    """The parts in `stack[part, ...]`, one behind the other in `dim`."""
    x = jnp.moveaxis(stack, 0, dim)
    return x.reshape(*x.shape[:dim], -1, *x.shape[dim + 2 :])


def _to_first(x: jax.Array, dim: int, parts: int) -> jax.Array:
    """`x` as `[part, ...]`: cut into equal parts along `dim`."""
    cut = x.reshape(*x.shape[:dim], parts, -1, *x.shape[dim + 1 :])
    return jnp.moveaxis(cut, dim, 0)


def _reduce_scatter(
    *xs: jax.Array, backend: Backend, axes: Axes, dim: int | Sequence[int], reduction: str = "sum"
) -> tuple[jax.Array, ...]:
    each = _each(dim, xs)
    if not _in_one_message(backend, xs) or reduction != "sum" or xs[0].dtype == np.bool_:
        return tuple(_scatter(x, backend, axes, dim, reduction) for x, dim in each)
    carried = [_as_bytes(x) for x in xs]
    n = lax.axis_size(axes)
    rows = [
        _to_first(x, dim, n).reshape(n, -1) for (x, _), (_, dim) in zip(carried, each, strict=True)
    ]
    pieces = _together(rows, lambda rows: lax.psum_scatter(rows, axes))
    return tuple(
        restore(piece.reshape(_scaled(x.shape, dim, 1, n)))
        for piece, (x, restore), (_, dim) in zip(pieces, carried, each, strict=True)
    )


def _scatter(x: jax.Array, backend: Backend, axes: Axes, dim: int, reduction: str) -> jax.Array:
    forms, group = FORMS[backend], lax.axis_size(axes)
    piece = _scaled(x.shape, dim, 1, group)
    if 0 in piece:
        return jnp.zeros(piece, x.dtype)
    x, restore = _as_bytes(x)
    if reduction != "sum" or x.dtype == np.bool_:
        # JAX has no other reduce-scatter. The same bytes: exchange the pieces, then reduce them.
        (x,) = _all_to_all(x, backend=backend, axes=axes, split_dim=dim, concat_dim=dim)
        return restore(_reduce(_to_first(x, dim, group), 0, reduction))
    if forms.scatter_rows(piece, dim, x.dtype):
        rows = jnp.moveaxis(x, dim, 0).reshape(-1, 128)
        part = lax.psum_scatter(rows, axes, tiled=True)
        shape = (piece[dim], *piece[:dim], *piece[dim + 1 :])
        return restore(jnp.moveaxis(part.reshape(shape), 0, dim))
    if forms.scatter_first(piece, dim, x.dtype):
        stack = _to_first(x, dim, group)
        row = stack.reshape(-1, *stack.shape[2:])
        return restore(lax.psum_scatter(row, axes, tiled=True))
    # One axis at a time, the major one goes first: its pieces are the large ones.
    for part in [axes] if forms.many_axes else axes:
        x = lax.psum_scatter(x, part, scatter_dimension=dim, tiled=True)
    return restore(x)


def _all_reduce(
    *xs: jax.Array, backend: Backend, axes: Axes, reduction: str
) -> tuple[jax.Array, ...]:
    if _in_one_message(backend, xs):
        how: dict[str, Any] = {"backend": backend, "axes": axes, "reduction": reduction}
        rows = _together([x.ravel() for x in xs], lambda row: _all_reduce(row, **how)[0])
        return tuple(row.reshape(x.shape) for row, x in zip(rows, xs, strict=True))
    carried = [_as_bytes(x) for x in xs]
    words = tuple(x for x, _ in carried)
    if reduction == "sum" and not any(x.dtype == np.bool_ for x in words):
        reduced = lax.psum(words, axes)
    else:
        reduced = tuple(_reduce_alone(x, backend, axes, reduction) for x in words)
    return tuple(restore(x) for x, (_, restore) in zip(reduced, carried, strict=True))


def _reduce_alone(x: jax.Array, backend: Backend, axes: Axes, reduction: str) -> jax.Array:
    reduction = _BOOLEAN[reduction] if x.dtype == np.bool_ else reduction
    if reduction in ("max", "min") and not jnp.issubdtype(x.dtype, jnp.complexfloating):
        return _extremum(x, backend, axes, reduction)
    # Neither JAX nor XLA's backends reduce these over a mesh: each device reduces a piece for all.
    how: dict[str, Any] = {"backend": backend, "axes": axes, "dim": 0}
    missing = -x.size % lax.axis_size(axes)
    pieces = jnp.concatenate([x.ravel(), jnp.zeros(missing, x.dtype)])
    (mine,) = _reduce_scatter(pieces, **how, reduction=reduction)
    (whole,) = _all_gather(mine, **how)
    return whole[: x.size].reshape(x.shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _extremum(x: jax.Array, backend: Backend, axes: Axes, reduction: str) -> jax.Array:
    native = lax.pmax if reduction == "max" else lax.pmin
    if backend != "cpu" or not jnp.issubdtype(x.dtype, jnp.floating):
        return native(x, axes)
    # XLA's collectives on CPU take a NaN for the smallest and the largest number alike, and so lose
    # it; whole numbers in the same order have no such hole.
    return _as_float(native(_as_ordered(x, reduction), axes), x.dtype)


def _as_ordered(x: jax.Array, reduction: str) -> jax.Array:
    """Integers in the order of the floats `x`, with NaN where `reduction` prefers it."""
    wide = x if x.dtype.itemsize >= 4 else x.astype(np.float32)
    nan = np.asarray(np.nan if reduction == "max" else -np.nan, wide.dtype)
    integer = np.int32 if wide.dtype.itemsize == 4 else np.int64
    return _flip(lax.bitcast_convert_type(jnp.where(jnp.isnan(wide), nan, wide), integer))


def _as_float(ordered: jax.Array, dtype: Any) -> jax.Array:
    wide = np.float32 if ordered.dtype == np.int32 else np.float64
    return lax.bitcast_convert_type(_flip(ordered), wide).astype(dtype)


def _flip(bits: jax.Array) -> jax.Array:
    """Negative floats are sign and magnitude: their order is that of the inverted magnitude."""
    return jnp.where(bits < 0, bits ^ np.iinfo(bits.dtype).max, bits)


@_extremum.defjvp
def _extremum_jvp(
    backend: Backend,
    axes: Axes,
    reduction: str,
    primals: tuple[jax.Array],
    tangents: tuple[jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Ties share the tangent evenly, as in `jnp.max`; JAX has no rule for `pmax` itself."""
    (x,), (tangent,) = primals, tangents
    result = _extremum(x, backend, axes, reduction)
    chosen = (x == result).astype(x.dtype)
    return result, lax.psum(chosen * tangent, axes) / lax.psum(chosen, axes)


def _all_to_all(
    x: jax.Array, *, backend: Backend, axes: Axes, split_dim: int, concat_dim: int
) -> tuple[jax.Array, ...]:
    x, restore = _as_bytes(x)
    if backend == "simulated":
        # It takes several axes as well, but JAX's rule for vmap errs on what is mapped over none.
        x = jnp.where(lax.axis_index(axes) >= 0, x, x)
    if 0 in x.shape:
        params = {"split_dim": split_dim, "concat_dim": concat_dim}
        return (restore(jnp.zeros(_exchanged(x.shape, lax.axis_size(axes), params), x.dtype)),)
    return (restore(lax.all_to_all(x, axes, split_dim, concat_dim, tiled=True)),)


def _collective_permute(
    x: jax.Array,
    *,
    backend: Backend,
    src: Axes = (),
    dst: Axes = (),
    axes: Axes = (),
    pairs: Sequence[tuple[int, int]] = (),
) -> tuple[jax.Array, ...]:
    """Blocks go from one order of the axes to another, or from one device to another by `pairs`."""
    x, restore = _as_bytes(x)
    if axes:
        return (restore(_permute_pairs(x, backend, axes, pairs)),)
    if backend != "simulated":
        # JAX wants the axes in the order of the mesh, and numbers the devices by that.
        axes = tuple(axis for axis in jax.sharding.get_abstract_mesh().axis_names if axis in src)
        pairs = _reordered(axes, src, dst, [lax.axis_size(axis) for axis in axes])
        return (restore(lax.ppermute(x, axes, pairs)),)
    # As above, with the blocks in the order of `src`.
    (blocks,) = _all_gather(x[None], backend=backend, axes=src, dim=0)
    return (restore(lax.dynamic_index_in_dim(blocks, lax.axis_index(dst), 0, keepdims=False)),)


def _permute_pairs(
    x: jax.Array, backend: Backend, axes: Axes, pairs: Sequence[tuple[int, int]]
) -> jax.Array:
    """What the sender of each (sender, receiver) holds, by their index over `axes`; else zeros."""
    if 0 in x.shape:
        return x
    if backend != "simulated":
        names = tuple(axis for axis in jax.sharding.get_abstract_mesh().axis_names if axis in axes)
        device = np.arange(lax.axis_size(axes)).reshape([lax.axis_size(axis) for axis in names])
        number = device.transpose([names.index(axis) for axis in axes]).ravel().tolist()
        return lax.ppermute(x, names, [(number[s], number[r]) for s, r in pairs])
    # Under vmap JAX permutes all devices or none: everyone sees all blocks and picks its own.
    sender = np.full(lax.axis_size(axes), -1)
    for s, r in pairs:
        sender[r] = s
    (blocks,) = _all_gather(x[None], backend=backend, axes=axes, dim=0)
    mine = jnp.asarray(sender)[lax.axis_index(axes)]
    block = lax.dynamic_index_in_dim(blocks, jnp.maximum(mine, 0), 0, keepdims=False)
    return jnp.where(mine >= 0, block, np.zeros((), x.dtype))


def _as_bytes(x: jax.Array) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """`x` in a dtype that every backend moves and adds, and the way back.

    PRNG keys travel as their words, and numbers narrower than a byte as bytes.
    """
    words, restore = as_words(x)
    if not jnp.issubdtype(words.dtype, jnp.number) or jax.dtypes.itemsize_bits(words.dtype) >= 8:
        return words, restore
    narrow = words.dtype
    byte = np.int8 if jnp.issubdtype(narrow, jnp.integer) else jnp.bfloat16
    return words.astype(byte), lambda wide: wide.astype(narrow)


def _reduce(x: jax.Array, dim: int, reduction: str) -> jax.Array:
    """`x` without `dim`, over which it is reduced on this device."""
    reduction = _BOOLEAN[reduction] if x.dtype == np.bool_ else reduction
    return lax.reduce(x, neutral_value(reduction, x.dtype), _COMBINE[reduction], (dim,))


def _gathered(shape: Shape, group: int, params: Mapping[str, Any]) -> Shape:
    return _scaled(shape, params["dim"], group, 1)


def _scattered(shape: Shape, group: int, params: Mapping[str, Any]) -> Shape:
    return _scaled(shape, params["dim"], 1, group)


def _exchanged(shape: Shape, group: int, params: Mapping[str, Any]) -> Shape:
    return _scaled(_scaled(shape, params["split_dim"], 1, group), params["concat_dim"], group, 1)


def _unchanged(shape: Shape, group: int, params: Mapping[str, Any]) -> Shape:
    return shape


def _scaled(shape: Shape, dim: int, times: int, over: int) -> Shape:
    if shape[dim] % over:
        raise ValueError(f"dim {dim} of {shape} does not fall into {over} equal pieces")
    return (*shape[:dim], shape[dim] * times // over, *shape[dim + 1 :])


_COMBINE: dict[str, Callable[[Any, Any], Any]] = {
    "sum": lax.add,
    "prod": lax.mul,
    "max": lax.max,
    "min": lax.min,
    "and": lax.bitwise_and,
    "or": lax.bitwise_or,
    "xor": lax.bitwise_xor,
}

# On booleans every reduction is a logical one; `max` and `min` are those that JAX has for a mesh.
_BOOLEAN = {
    "sum": "max", "or": "max", "max": "max",
    "prod": "min", "and": "min", "min": "min",
    "xor": "xor",
}  # fmt: skip

TABLE: Mapping[str, Collective] = {
    row.name: row
    for row in (
        Collective("all_gather", lambda n: n - 1, _gathered, _all_gather),
        Collective("reduce_scatter", lambda n: (n - 1) / n, _scattered, _reduce_scatter),
        Collective("all_reduce", lambda n: 2 * (n - 1) / n, _unchanged, _all_reduce),
        Collective("all_to_all", lambda n: (n - 1) / n, _exchanged, _all_to_all),
        Collective("collective_permute", lambda n: 1.0, _unchanged, _collective_permute),
    )
}
