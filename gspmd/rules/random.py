"""Rules of random numbers: every device draws the very bits that one device would have drawn.

Most of JAX's generators, threefry first, are functions of a key and a counter: the position of the
element in the whole array. A shard hashes the positions that it holds.

`rbg` and `unsafe_rbg` leave the counting to XLA, and draw for a stack of keys under `vmap` from the
first key alone: what they draw is drawn whole.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.random import threefry2x32_p

from gspmd._compat import gamma_of_key, generator_primitive
from gspmd.ir import Op
from gspmd.rules.factor import FactorRule, Factors, Split, gathered, rule
from gspmd.rules.pointwise import pointwise
from gspmd.sharding import Axes

Words = Sequence[Any]
Hash = Callable[[Words, Any, Any], Words]


def _threefry2x32(key: Words, high: Any, low: Any) -> Words:
    return threefry2x32_p.bind(*key, high, low)


def _threefry4x32(key: Words, high: Any, low: Any) -> Words:
    none = jnp.zeros_like(low)
    a, b, c, d = generator_primitive("threefry4x32").bind(*key, high, low, none, none)
    return a ^ c, b ^ d


def _philox2x32(key: Words, high: Any, low: Any) -> Words:
    return generator_primitive("philox2x32").bind(*key, high, low)


def _philox4x32(key: Words, high: Any, low: Any) -> Words:
    none = jnp.zeros_like(low)
    return generator_primitive("philox4x32").bind(*key, high, low, none, none)


_HASHES: dict[str, Hash] = {
    "key<fry>": _threefry2x32,
    "key<fry4>": _threefry4x32,
    "key<phx2>": _philox2x32,
    "key<phx4>": _philox4x32,
}
"""What a generator makes of a key and of a counter in two words, by the type of its keys.

The first two words make 64 bits; the sum without carry of all words makes 32 or fewer.
"""


def _each_by_itself(op: Op) -> bool:
    """Whether the keys of a stack are treated as if each was alone."""
    generator = str(op.ins[0].dtype)
    if op.name in ("random_split", "random_fold_in") and generator == "key<rbg>":
        return True  # by threefry
    return generator in _HASHES


def _stacked(op: Op, known: bool) -> FactorRule:
    """Dims of the keys pass; what a single key grows into, or is stored as, stays whole."""
    if not known:
        return gathered(op)
    f = Factors()
    rank = min(len(x.shape) for x in (*op.ins, *op.outs))
    keys = f.dims(op.outs[0].shape[:rank])
    return f.rule(
        [(*keys, *f.dims(x.shape[rank:], "whole")) for x in op.ins],
        [(*keys, *f.dims(x.shape[rank:], "whole")) for x in op.outs],
    )


@rule("random_wrap", "random_unwrap")
def stored(op: Op) -> FactorRule:
    return _stacked(op, True)


def _in_order(op: Op) -> bool:
    """Whether a key's draws are hashes of their positions, one after the other.

    Before it was made partitionable, threefry2x32 counted the halves of an array side by side.
    """
    set_so = jax.config.jax_threefry_partitionable  # pyright: ignore[reportAttributeAccessIssue]
    return str(op.ins[0].dtype) != "key<fry>" or set_so


def _hashed(op: Op, keys: Any, whole: Sequence[int], local: Sequence[int], axes: Any) -> Words:
    """What the generator makes of each of `keys` and the local part of the counts to `whole`."""
    words = jax.random.key_data(keys)
    shape, dims = (*keys.shape, *local), range(keys.ndim)
    key = [words[..., i] for i in range(words.shape[-1])]
    if keys.ndim:  # a single key's words stay scalars, lest loops over the rounds carry arrays
        key = [_spread(word, shape, dims) for word in key]
    counts = flat_positions(whole, local, axes)
    high, low = (_spread(x, shape, range(keys.ndim, len(shape))) for x in counts)
    return _HASHES[str(op.ins[0].dtype)](key, high, low)


def _shape_params(op: Op, split: Split) -> dict[str, Any]:
    return {**op.params, "shape": split.out_shapes[0][len(op.ins[0].shape) :]}


def _new_keys_call(op: Op, split: Split) -> Callable[..., Any]:
    rank, shape = len(op.ins[0].shape), split.out_shapes[0]
    axes = split.outs[0].dims[rank:]
    if not any(axes):
        assert op.call is not None
        return functools.partial(op.call, **{**op.params, "shape": shape[rank:]})

    def local(keys: Any, **_: Any) -> Any:
        words = _hashed(op, keys, op.params["shape"], shape[rank:], axes)
        return jax.random.wrap_key_data(jnp.stack(words, axis=-1), impl=jax.random.key_impl(keys))

    return local


@rule("random_split", params=_shape_params, call=_new_keys_call)
def random_split(op: Op) -> FactorRule:
    """The new keys of threefry2x32 are hashes of a count; those of others stay together."""
    known = _each_by_itself(op)
    if str(op.ins[0].dtype) != "key<fry>" or not _in_order(op):
        return _stacked(op, known)
    f = Factors()
    rank = len(op.ins[0].shape)
    dims = f.dims(op.outs[0].shape)
    return f.rule([dims[:rank]], [dims])


@rule("random_fold_in")
def random_fold_in(op: Op) -> FactorRule:
    return pointwise(op) if _each_by_itself(op) else gathered(op)


def _gamma_call(op: Op, split: Split) -> Callable[..., Any]:
    rank, shape = len(op.ins[0].shape), split.out_shapes[0]
    axes = split.outs[0].dims[rank:]
    if not any(axes):
        assert op.call is not None
        return op.call
    draw = functools.partial(gamma_of_key(), **op.params)

    def local(keys: Any, alpha: Any, **_: Any) -> Any:
        words = _hashed(op, keys, op.ins[1].shape[rank:], shape[rank:], axes)
        own = jnp.stack(words, axis=-1).reshape(-1, 2)
        own = jax.random.wrap_key_data(own, impl=jax.random.key_impl(keys))
        return jax.vmap(draw)(own, alpha.ravel()).reshape(alpha.shape)

    return local


@rule("random_gamma", call=_gamma_call)
def random_gamma(op: Op) -> FactorRule:
    """A key is split into one for each element under it.

    Where these are hashes of a count, a device makes those of its elements; else all stay together.
    """
    if not _each_by_itself(op):
        return gathered(op)
    counted = str(op.ins[0].dtype) == "key<fry>" and _in_order(op) and gamma_of_key() is not None
    f = Factors()
    keys, alpha = op.ins
    rank = len(keys.shape)
    dims = f.dims(alpha.shape[:rank])
    rest = f.dims(alpha.shape[rank:], "pass" if counted else "whole")
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
        words = _hashed(op, keys, op.params["shape"], shape[rank:], axes)
        return _to_width(words, op.params["bit_width"])

    return local


def _spread(x: Any, shape: Sequence[int], dims: range) -> Any:
    return lax.broadcast_in_dim(x, shape, tuple(dims))


def _to_width(words: Words, width: int) -> Any:
    """The `width` bits that JAX makes of the words of a hash."""
    if width == 64:
        high, low = words[:2]
        return high.astype(jnp.uint64) << 32 | low.astype(jnp.uint64)
    return functools.reduce(lax.bitwise_xor, words).astype(f"uint{width}")


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


@rule("random_bits", params=_shape_params, call=_random_bits_call)
def random_bits(op: Op) -> FactorRule:
    """Any dim may be split, if the generator is a counter; else nothing may."""
    (keys,), (out,) = op.ins, op.outs
    generator = str(keys.dtype)
    if generator not in _HASHES:
        return gathered(op)
    f = Factors()
    rank = len(keys.shape)
    batch = f.dims(out.shape[:rank])
    bits = f.dims(out.shape[rank:], "pass" if _in_order(op) else "whole")
    return f.rule([batch], [(*batch, *bits)])


def _positions_call(op: Op, split: Split) -> Callable[..., Any]:
    shape, axes = split.out_shapes[0], split.outs[0].dims
    return lambda **_: flat_positions(op.params["shape"], shape, axes)


@rule("iota_2x32_shape", call=_positions_call)
def positions(op: Op) -> FactorRule:
    """The counter itself, in two words; each device counts what it holds."""
    f = Factors()
    dims = f.dims(op.outs[0].shape)
    return f.rule([], [dims, dims])
