"""The table of collectives: what each moves, what it gives, and how JAX spells it.

Two targets run the same program. `"devices"` is the inside of `jax.shard_map`, where every JAX
collective takes several axes at once. `"simulated"` is the inside of nested `jax.vmap`, where
`all_gather`, `psum_scatter` and `ppermute` take one: there a collective over several axes is a
sequence of collectives over one.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gspmd.ir import Op
from gspmd.local import as_words, neutral_value
from gspmd.sharding import Axes

Target = Literal["devices", "simulated"]
Shape = tuple[int, ...]


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


def result_shape(kind: str, shape: Shape, group: int, params: Mapping[str, Any]) -> Shape:
    """Local shape of the result for an operand of local `shape`."""
    return TABLE[kind].result(tuple(shape), group, params)


def lower(op: Op, args: Sequence[jax.Array], target: Target) -> tuple[jax.Array, ...]:
    """The results of the collective `op` on this device's `args`, in terms of `jax.lax`."""
    return TABLE[op.name].lower(*args, target=target, **op.params)


def _all_gather(x: jax.Array, *, target: Target, axes: Axes, dim: int) -> tuple[jax.Array, ...]:
    x, restore = _as_bytes(x)
    shape = _gathered(x.shape, lax.axis_size(axes), {"dim": dim})
    if 0 in shape:  # XLA refuses to gather along a dim of size 0
        return (restore(jnp.zeros(shape, x.dtype)),)
    # One axis at a time, the minor one goes first: its shards are neighbours in the result.
    for group in [axes] if target == "devices" else reversed(axes):
        x = lax.all_gather(x, group, axis=dim, tiled=True)
    return (restore(x),)


def _reduce_scatter(
    x: jax.Array, *, target: Target, axes: Axes, dim: int, reduction: str = "sum"
) -> tuple[jax.Array, ...]:
    group = lax.axis_size(axes)
    piece = _scattered(x.shape, group, {"dim": dim})
    if 0 in piece:
        return (jnp.zeros(piece, x.dtype),)
    x, restore = _as_bytes(x)
    if reduction != "sum" or x.dtype == np.bool_:
        # JAX has no other reduce-scatter. The same bytes: exchange the pieces, then reduce them.
        (x,) = _all_to_all(x, target=target, axes=axes, split_dim=dim, concat_dim=dim)
        pieces = x.reshape(*x.shape[:dim], group, *piece[dim:])
        return (restore(_reduce(pieces, dim, reduction)),)
    if target == "devices" and dim == x.ndim - 1:
        # Pieces as a dim of their own: a tiled scatter of the minor dim into pieces of 128 becomes
        # an all-reduce and a slice in the TPU compiler, at twice the bytes (libtpu 0.0.42).
        x = x.reshape(*x.shape[:dim], group, piece[dim])
        return (restore(lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=False)),)
    # One axis at a time, the major one goes first: its pieces are the large ones.
    for part in [axes] if target == "devices" else axes:
        x = lax.psum_scatter(x, part, scatter_dimension=dim, tiled=True)
    return (restore(x),)


def _all_reduce(
    *xs: jax.Array, target: Target, axes: Axes, reduction: str
) -> tuple[jax.Array, ...]:
    carried = [_as_bytes(x) for x in xs]
    words = tuple(x for x, _ in carried)
    if reduction == "sum" and not any(x.dtype == np.bool_ for x in words):
        reduced = lax.psum(words, axes)
    else:
        reduced = tuple(_reduce_alone(x, target, axes, reduction) for x in words)
    return tuple(restore(x) for x, (_, restore) in zip(reduced, carried, strict=True))


def _reduce_alone(x: jax.Array, target: Target, axes: Axes, reduction: str) -> jax.Array:
    reduction = _BOOLEAN[reduction] if x.dtype == np.bool_ else reduction
    if reduction in ("max", "min") and not jnp.issubdtype(x.dtype, jnp.complexfloating):
        return _extremum(x, target, axes, reduction)
    # Neither JAX nor XLA's backends reduce these over a mesh: each device reduces a piece for all.
    how: dict[str, Any] = {"target": target, "axes": axes, "dim": 0}
    missing = -x.size % lax.axis_size(axes)
    pieces = jnp.concatenate([x.ravel(), jnp.zeros(missing, x.dtype)])
    (mine,) = _reduce_scatter(pieces, **how, reduction=reduction)
    (whole,) = _all_gather(mine, **how)
    return whole[: x.size].reshape(x.shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _extremum(x: jax.Array, target: Target, axes: Axes, reduction: str) -> jax.Array:
    native = functools.partial(lax.pmax if reduction == "max" else lax.pmin, axis_name=axes)
    if target == "simulated" or not jnp.issubdtype(x.dtype, jnp.floating):
        return native(x)
    # XLA's collectives on CPU take a NaN for the smallest and the largest number alike, and so lose
    # it; whole numbers in the same order have no such hole.
    ordered = lambda x: _as_float(native(_as_ordered(x, reduction)), x.dtype)  # noqa: E731
    return lax.platform_dependent(x, cpu=ordered, default=native)


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
    target: Target,
    axes: Axes,
    reduction: str,
    primals: tuple[jax.Array],
    tangents: tuple[jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Ties share the tangent evenly, as in `jnp.max`; JAX has no rule for `pmax` itself."""
    (x,), (tangent,) = primals, tangents
    result = _extremum(x, target, axes, reduction)
    chosen = (x == result).astype(x.dtype)
    return result, lax.psum(chosen * tangent, axes) / lax.psum(chosen, axes)


def _all_to_all(
    x: jax.Array, *, target: Target, axes: Axes, split_dim: int, concat_dim: int
) -> tuple[jax.Array, ...]:
    x, restore = _as_bytes(x)
    if target == "simulated":
        # It takes several axes as well, but JAX's rule for vmap errs on what is mapped over none.
        x = jnp.where(lax.axis_index(axes) >= 0, x, x)
    if 0 in x.shape:
        params = {"split_dim": split_dim, "concat_dim": concat_dim}
        return (restore(jnp.zeros(_exchanged(x.shape, lax.axis_size(axes), params), x.dtype)),)
    return (restore(lax.all_to_all(x, axes, split_dim, concat_dim, tiled=True)),)


def _collective_permute(
    x: jax.Array,
    *,
    target: Target,
    src: Axes = (),
    dst: Axes = (),
    axes: Axes = (),
    pairs: Sequence[tuple[int, int]] = (),
) -> tuple[jax.Array, ...]:
    """Blocks go from one order of the axes to another, or from one device to another by `pairs`."""
    x, restore = _as_bytes(x)
    if axes:
        return (restore(_permute_pairs(x, target, axes, pairs)),)
    if target == "devices":
        # JAX wants the axes in the order of the mesh, and numbers the devices by that.
        axes = tuple(axis for axis in jax.sharding.get_abstract_mesh().axis_names if axis in src)
        sizes = [lax.axis_size(axis) for axis in axes]
        device = np.arange(np.prod(sizes)).reshape(sizes)
        senders, receivers = (
            device.transpose([axes.index(axis) for axis in order]).ravel().tolist()
            for order in (src, dst)
        )
        pairs = list(zip(senders, receivers, strict=True))
        return (restore(lax.ppermute(x, axes, pairs)),)
    # As above, with the blocks in the order of `src`.
    (blocks,) = _all_gather(x[None], target=target, axes=src, dim=0)
    return (restore(lax.dynamic_index_in_dim(blocks, lax.axis_index(dst), 0, keepdims=False)),)


def _permute_pairs(
    x: jax.Array, target: Target, axes: Axes, pairs: Sequence[tuple[int, int]]
) -> jax.Array:
    """What the sender of each (sender, receiver) holds, by their index over `axes`; else zeros."""
    if 0 in x.shape:
        return x
    if target == "devices":
        names = tuple(axis for axis in jax.sharding.get_abstract_mesh().axis_names if axis in axes)
        device = np.arange(lax.axis_size(axes)).reshape([lax.axis_size(axis) for axis in names])
        number = device.transpose([names.index(axis) for axis in axes]).ravel().tolist()
        return lax.ppermute(x, names, [(number[s], number[r]) for s, r in pairs])
    # Under vmap JAX permutes all devices or none: everyone sees all blocks and picks its own.
    sender = np.full(lax.axis_size(axes), -1)
    for s, r in pairs:
        sender[r] = s
    (blocks,) = _all_gather(x[None], target=target, axes=axes, dim=0)
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
