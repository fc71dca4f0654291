"""Rules of random numbers: every device draws the very bits that one device would have drawn.

Threefry, JAX's default generator, is a function of a key and a counter: the position of the element
in the whole array. A shard hashes the positions that it holds.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.random import threefry2x32_p

from gspmd.ir import Op
from gspmd.rules.factor import FactorRule, Factors, Split, gathered, rule
from gspmd.sharding import Axes


def _keyed(op: Op) -> FactorRule:
    """Dims of the keys pass; what a single key grows into, or is stored as, stays whole."""
    f = Factors()
    rank = min(len(x.shape) for x in (*op.ins, *op.outs))
    keys = f.dims(op.outs[0].shape[:rank])
    return f.rule(
        [(*keys, *f.dims(x.shape[rank:], "whole")) for x in op.ins],
        [(*keys, *f.dims(x.shape[rank:], "whole")) for x in op.outs],
    )


@rule("random_split", "random_wrap", "random_unwrap")
def keyed(op: Op) -> FactorRule:
    return _keyed(op)


@rule("random_gamma")
def random_gamma(op: Op) -> FactorRule:
    """A key is split into one for each element under it, so that these elements stay together."""
    f = Factors()
    keys, alpha = op.ins
    rank = len(keys.shape)
    dims = f.dims(alpha.shape[:rank])
    rest = f.dims(alpha.shape[rank:], "whole")
    return f.rule([dims, (*dims, *rest)], [(*dims, *rest)], forward=1, backward=1)


@rule("rng_bit_generator", "rng_uniform")
def whole(op: Op) -> FactorRule:
    return gathered(op)


def _random_bits_call(op: Op, split: Split) -> Callable[..., Any]:
    rank = len(op.ins[0].shape)
    axes, shape = split.outs[0].dims[rank:], split.out_shapes[0]
    if not any(axes):
        assert op.call is not None
        return functools.partial(op.call, **{**op.params, "shape": shape[rank:]})

    def local(keys: Any, **_: Any) -> Any:
        words = jax.random.key_data(keys)
        counters = flat_positions(op.params["shape"], shape[rank:], axes)
        operands = [_spread(words[..., i], shape, range(rank)) for i in range(2)]
        operands += [_spread(counter, shape, range(rank, len(shape))) for counter in counters]
        high, low = threefry2x32_p.bind(*operands)
        return _to_width(high, low, op.params["bit_width"])

    return local


def _spread(x: Any, shape: Sequence[int], dims: range) -> Any:
    return lax.broadcast_in_dim(x, shape, tuple(dims))


def _to_width(high: Any, low: Any, width: int) -> Any:
    """The `width` bits that JAX makes of the two words of a threefry hash."""
    if width == 64:
        return high.astype(jnp.uint64) << 32 | low.astype(jnp.uint64)
    return (high ^ low).astype(f"uint{width}")


def flat_positions(
    shape: Sequence[int], local: Sequence[int], axes: Sequence[Axes]
) -> tuple[Any, Any]:
    """Where each element of a shard lies in the flattened whole: a 64-bit count, as two words."""
    high = low = jnp.zeros(tuple(local), jnp.uint32)
    for d, (size, names) in enumerate(zip(local, axes, strict=True)):
        stride = math.prod(shape[d + 1 :])
        position = lax.iota(jnp.uint32, size)
        if names:
            position += lax.axis_index(names).astype(jnp.uint32) * jnp.uint32(size)
        step_high, step_low = (_spread(x, local, range(d, d + 1)) for x in _times(position, stride))
        low = low + step_low
        high = high + step_high + (low < step_low).astype(jnp.uint32)  # the carry
    return high, low


def _times(x: Any, constant: int) -> tuple[Any, Any]:
    """The 64-bit product of uint32s and an integer, as two words, without 64-bit arithmetic."""
    half = jnp.uint32(0xFFFF)
    x0, x1 = x & half, x >> 16
    c0, c1 = (jnp.uint32(constant >> shift & 0xFFFF) for shift in (0, 16))
    low = x * jnp.uint32(constant & 0xFFFFFFFF)
    middle = x1 * c0 + (x0 * c0 >> 16)
    upper = x0 * c1 + (middle & half)
    high = x1 * c1 + (middle >> 16) + (upper >> 16)
    return high + x * jnp.uint32(constant >> 32 & 0xFFFFFFFF), low


def _random_bits_params(op: Op, split: Split) -> dict[str, Any]:
    return {**op.params, "shape": split.out_shapes[0][len(op.ins[0].shape) :]}


@rule("random_bits", params=_random_bits_params, call=_random_bits_call)
def random_bits(op: Op) -> FactorRule:
    """Any dim may be split, if the generator is a counter; else the bits of one key stay whole."""
    (keys,), (out,) = op.ins, op.outs
    rank = len(keys.shape)
    by_counter = jax.config.jax_threefry_partitionable  # pyright: ignore[reportAttributeAccessIssue]
    counted = str(keys.dtype) == "key<fry>" and by_counter
    f = Factors()
    batch = f.dims(out.shape[:rank])
    bits = f.dims(out.shape[rank:], "pass" if counted else "whole")
    return f.rule([batch], [(*batch, *bits)])
