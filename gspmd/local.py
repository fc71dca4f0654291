"""What a device does to its own shard: cut it out of a whole, hide its padding, keep one copy.

These functions run inside `jax.shard_map` or under nested `jax.vmap`, where the mesh axes have
names; they use no collective. Group order is always the same: the first axis is major.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gspmd.sharding import Axes


def shard(x: jax.Array, *, axes: Axes, dim: int, size: int) -> jax.Array:
    """This device's block of a dim that it holds whole: `ceil(size / k)` entries, zero padded."""
    parts = lax.axis_size(axes)
    block = -(-size // parts)
    x, restore = as_words(x)
    if block * parts != size:
        widths = [(0, 0, 0)] * x.ndim
        widths[dim] = (0, block * parts - size, 0)
        x = lax.pad(x, np.zeros((), x.dtype), widths)
    start = lax.axis_index(axes) * block
    return restore(lax.dynamic_slice_in_dim(x, start, block, dim))


def pad_to(x: jax.Array, *, dim: int, size: int) -> jax.Array:
    """`x` with zeros appended to `dim` until it has `size` entries."""
    x, restore = as_words(x)
    widths = [(0, 0, 0)] * x.ndim
    widths[dim] = (0, size - x.shape[dim], 0)
    return restore(lax.pad(x, np.zeros((), x.dtype), widths))


def mask(x: jax.Array, *, axes: Axes, dim: int, size: int, reduction: str) -> jax.Array:
    """`x` with neutral elements of `reduction` in place of what lies past `size` in `dim`."""
    block = x.shape[dim]
    if block * lax.axis_size(axes) <= size:
        return x
    position = lax.axis_index(axes) * block + lax.broadcasted_iota(np.int32, x.shape, dim)
    return jnp.where(position < size, x, neutral_value(reduction, x.dtype))


def relabel(x: jax.Array) -> jax.Array:
    """`x` itself: the shard of another array, whose end lies elsewhere."""
    return x


def owner(x: jax.Array, *, axes: Axes) -> jax.Array:
    """`x` on the device that comes first along every one of `axes`, zeros on the others."""
    x, restore = as_words(x)
    return restore(jnp.where(lax.axis_index(axes) == 0, x, np.zeros((), x.dtype)))


def neutral_value(reduction: str, dtype: Any) -> np.ndarray:
    """The scalar that changes nothing under `reduction`: 0 for a sum, -inf for a max, ..."""
    dtype = np.dtype(dtype)
    return np.asarray(_NEUTRAL[reduction](dtype)).astype(dtype)


def is_key(dtype: Any) -> bool:
    """Whether `dtype` is that of typed PRNG keys, on which arithmetic is not defined."""
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


def as_words(x: jax.Array) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """`x` as plain numbers, PRNG keys as words in trailing dims, and the way back."""
    if not is_key(x.dtype):
        return x, lambda words: words
    wrap = functools.partial(jax.random.wrap_key_data, impl=jax.random.key_impl(x))
    return jax.random.key_data(x), wrap


def _lowest(dtype: np.dtype) -> Any:
    if dtype == np.bool_:
        return False
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).min
    return _infinity(dtype, -1)


def _highest(dtype: np.dtype) -> Any:
    if dtype == np.bool_:
        return True
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).max
    return _infinity(dtype, 1)


def _infinity(dtype: np.dtype, sign: int) -> Any:
    """Infinity, or the largest finite number of a format that has none (`float8_e4m3fn`)."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return complex(sign * np.inf, sign * np.inf)  # complex numbers are ordered by real part
    infinity = np.asarray(sign * np.inf).astype(dtype)
    if np.isinf(infinity.astype(np.float64)):
        return infinity
    finfo = jnp.finfo(dtype)
    return finfo.max if sign > 0 else finfo.min


_NEUTRAL: dict[str, Callable[[np.dtype], Any]] = {
    "sum": lambda dtype: 0,
    "prod": lambda dtype: 1,
    "max": _lowest,
    "min": _highest,
    "and": lambda dtype: True if dtype == np.bool_ else ~np.zeros((), dtype),
    "or": lambda dtype: 0,
    "xor": lambda dtype: 0,
}

REDUCTIONS = tuple(_NEUTRAL)
