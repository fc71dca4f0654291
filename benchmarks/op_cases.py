"""Op classes of `jax.lax` on sharded operands: what `ops_against_xla.py` runs."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from op_case import Case, definite, positive


def cases() -> Iterator[Case]:
    """All cases, class by class."""
    for family in (
        _convolutions, _conv_gradients, _windows, _slices, _joins, _gathers, _dynamic, _sorts,
        _extremes, _cumulative, _ffts, _batched_linalg, _split_linalg, _random, _reductions,
        _loops, _uneven,
    ):  # fmt: skip
        yield from family()


# ------------------------------------------------------------------------------------------ windows


def _conv(strides: Any = (1, 1), padding: Any = "SAME", **options: Any) -> Callable[..., Any]:
    dims = ("NHWC", "HWIO", "NHWC") if len(strides) == 2 else ("NHC", "HIO", "NHC")
    return lambda x, w: lax.conv_general_dilated(
        x, w, strides, padding, dimension_numbers=dims, **options
    )


def _convolutions() -> Iterator[Case]:
    c = functools.partial(Case, "convolution")
    w = "f32[3,3,16,16]"
    yield c("batch", _conv(), f"f32[16@x,32,32,16], {w} -> f32[16@x,32,32,16]")
    yield c("output features", _conv(), "f32[4,32,32,16], f32[3,3,16,32@x] -> f32[4,32,32,32@x]")
    yield c("input features", _conv(), "f32[4,32,32,32@x], f32[3,3,32@x,16] -> f32[4,32,32,16]")
    yield c("spatial", _conv(), f"f32[4,128@x,32,16], {w} -> f32[4,128@x,32,16]")
    yield c("spatial, two axes", _conv(), f"f32[4,64@x,64@y,16], {w} -> f32[4,64@x,64@y,16]")
    both = "f32[4,128@(x,y),32,16]"
    yield c("one spatial dim over two axes", _conv(), f"{both}, {w} -> {both}")
    yield c("strided", _conv((2, 2)), f"f32[4,128@x,32,16], {w} -> f32[4,64@x,16,16]")
    up = _conv(lhs_dilation=(2, 2), padding=((2, 1), (2, 1)))
    yield c("dilated lhs", up, f"f32[4,64@x,16,16], {w} -> f32[4,128@x,32,16]")
    atrous = _conv(rhs_dilation=(2, 2))
    yield c("dilated rhs", atrous, f"f32[4,128@x,32,16], {w} -> f32[4,128@x,32,16]")
    wide = "f32[8,128@x,16], f32[65,16,16] -> f32[8,128@x,16]"
    yield c("halo of two shards", _conv((1,)), wide)
    each = _conv(feature_group_count=32)
    x, wx = "f32[16,32,32,32]", "f32[3,3,1,32]"
    yield c("depthwise, batch", each, f"f32[16@x,32,32,32], {wx} -> f32[16@x,32,32,32]")
    yield c("depthwise, features", each, f"{x[:-3]}32@x], {wx[:-1]}@x] -> {x[:-3]}32@x]")
    yield c("depthwise, spatial", each, f"f32[16,32@x,32,32], {wx} -> f32[16,32@x,32,32]")
    c = functools.partial(Case, "grouped convolution")
    four, eight = _conv(feature_group_count=4), _conv(feature_group_count=8)
    w = "f32[3,3,4,16]"
    yield c("batch", four, f"f32[16@x,32,32,16], {w} -> f32[16@x,32,32,16]", True)
    yield c("spatial", four, f"f32[4,128@x,32,16], {w} -> f32[4,128@x,32,16]", True)
    yield c("groups", eight, "f32[4,32,32,32@x], f32[3,3,4,32@x] -> f32[4,32,32,32@x]", True)
    batches = _conv(batch_group_count=8)
    w = "f32[3,3,16,16]"
    yield c("batch groups", batches, f"f32[32@x,32,32,16], {w[:-1]}@x] -> f32[4,32,32,16@x]")
    yield c("batch groups, spatial", batches, f"f32[32,64@x,16,16], {w} -> f32[4,64@x,16,16]")


def _pulled(fn: Callable[..., Any], which: int) -> Callable[..., Any]:
    """The gradient of `fn(x, w)` in operand `which`, given that of the result."""
    return lambda x, w, g: jax.vjp(fn, x, w)[1](g)[which]


def _conv_gradients() -> Iterator[Case]:
    c = functools.partial(Case, "convolution gradient")
    w = "f32[3,3,16,16]"
    for name, fn, x, g in (
        ("batch", _conv(), "f32[16@x,32,32,16]", "f32[16@x,32,32,16]"),
        ("spatial", _conv(), "f32[4,128@x,32,16]", "f32[4,128@x,32,16]"),
        ("spatial, two axes", _conv(), "f32[4,64@x,64@y,16]", "f32[4,64@x,64@y,16]"),
        ("strided", _conv((2, 2)), "f32[4,128@x,32,16]", "f32[4,64@x,16,16]"),
    ):
        yield c(f"weight, {name}", _pulled(fn, 1), f"{x}, {w}, {g} -> {w}")
        yield c(f"input, {name}", _pulled(fn, 0), f"{x}, {w}, {g} -> {x}")
    four = _conv(feature_group_count=4)
    x, w = "f32[16@x,32,32,16]", "f32[3,3,4,16]"
    yield c("weight, grouped, batch", _pulled(four, 1), f"{x}, {w}, {x} -> {w}")
    yield c("input, grouped, batch", _pulled(four, 0), f"{x}, {w}, {x} -> {x}")
    each = _conv(feature_group_count=16)
    x, w = "f32[4,128@x,32,16]", "f32[3,3,1,16]"
    yield c("weight, depthwise, spatial", _pulled(each, 1), f"{x}, {w}, {x} -> {w}")
    yield c("input, depthwise, spatial", _pulled(each, 0), f"{x}, {w}, {x} -> {x}")


def _pool(kind: str, size: int, stride: int) -> Callable[..., Any]:
    start, combine = (-jnp.inf, lax.max) if kind == "max" else (0.0, lax.add)
    window, strides = (1, size, size, 1), (1, stride, stride, 1)
    return lambda x: lax.reduce_window(x, start, combine, window, strides, "SAME")


def _pool_gradient(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, g: jax.vjp(fn, x)[1](g)[0]


def _windows() -> Iterator[Case]:
    c = functools.partial(Case, "reduce_window")
    x, half = "f32[4,128@x,64,16]", "f32[4,64@x,32,16]"
    two, half_two = "f32[4,128@x,64@y,16]", "f32[4,64@x,32@y,16]"
    batch, half_batch = "f32[8@x,64,64,16]", "f32[8@x,32,32,16]"
    for kind in ("max", "sum"):
        pool, overlap, dense = _pool(kind, 2, 2), _pool(kind, 3, 2), _pool(kind, 3, 1)
        yield c(f"{kind}, 2 by 2", pool, f"{x} -> {half}")
        yield c(f"{kind}, 3 by 3", dense, f"{x} -> {x}")
        yield c(f"{kind}, 3 by 3, stride 2, two axes", overlap, f"{two} -> {half_two}")
        yield c(f"{kind}, batch", overlap, f"{batch} -> {half_batch}")
    c = functools.partial(Case, "reduce_window gradient")
    for kind in ("max", "sum"):
        pool, overlap = (_pool_gradient(_pool(kind, size, 2)) for size in (2, 3))
        yield c(f"{kind}, 2 by 2", pool, f"{x}, {half} -> {x}")
        yield c(f"{kind}, 3 by 3, stride 2", overlap, f"{x}, {half} -> {x}")
        yield c(f"{kind}, 3 by 3, two axes", overlap, f"{two}, {half_two} -> {two}")
        yield c(f"{kind}, batch", overlap, f"{batch}, {half_batch} -> {batch}")


# ----------------------------------------------------------------------- slices and their opposites

ROWS = "f32[2048@x,512]"


def _slices() -> Iterator[Case]:
    c = functools.partial(Case, "slice")
    yield c("inner half", lambda x: x[512:1536], f"{ROWS} -> f32[1024@x,512]")
    yield c("all but 8 rows", lambda x: x[8:], f"{ROWS} -> f32[2040@x,512]")
    yield c("8 rows", lambda x: x[100:108], f"{ROWS} -> f32[8@x,512]")
    yield c("one row", lambda x: x[100], f"{ROWS} -> f32[512]")
    yield c("every other row", lambda x: x[::2], f"{ROWS} -> f32[1024@x,512]")
    yield c("every third of some", lambda x: x[3:1539:3], f"{ROWS} -> f32[512@x,512]")
    yield c("halves", lambda x: jnp.split(x, 2), f"{ROWS} -> f32[1024@x,512], f32[1024@x,512]")
    c = functools.partial(Case, "pad")
    for name, low, high, inside, rows in (
        ("edges, few rows", 3, 5, 0, 2056),
        ("edges, two shards", 512, 0, 0, 2560),
        ("interior", 0, 1, 1, 4096),
        ("negative", -8, -24, 0, 2016),
        ("negative and interior", -3, 4, 1, 4096),
    ):
        config = ((low, high, inside), (0, 0, 0))
        pad = functools.partial(lax.pad, padding_value=np.float32(1), padding_config=config)
        yield c(name, pad, f"{ROWS} -> f32[{rows}@x,512]")
    wrap = lambda x: jnp.pad(x, ((8, 8), (0, 0)), mode="wrap")  # noqa: E731
    yield c("wrapped", wrap, f"{ROWS} -> f32[2064@x,512]")


def _joins() -> Iterator[Case]:
    c = functools.partial(Case, "roll")
    yield c("3 rows", lambda x: jnp.roll(x, 3, 0), f"{ROWS} -> {ROWS}")
    yield c("700 rows", lambda x: jnp.roll(x, 700, 0), f"{ROWS} -> {ROWS}")
    c = functools.partial(Case, "concatenate")
    join = lambda *xs: jnp.concatenate(xs)  # noqa: E731
    yield c("two halves", join, f"f32[1024@x,512], f32[1024@x,512] -> {ROWS}")
    yield c("unequal parts", join, f"f32[1536@x,512], f32[256@x,512], f32[256@x,512] -> {ROWS}")
    yield c("a few rows", join, f"f32[8,512], {ROWS} -> f32[2056@x,512]")
    yield c("twice itself", lambda x: jnp.tile(x, (2, 1)), f"f32[1024@x,512] -> {ROWS}")
    c = functools.partial(Case, "rev")
    yield c("rows", lambda x: jnp.flip(x, 0), f"{ROWS} -> {ROWS}")
    yield c("free dim", lambda x: jnp.flip(x, 1), f"{ROWS} -> {ROWS}")


# -------------------------------------------------------------------------------------- by position


def _gathers() -> Iterator[Case]:
    c = functools.partial(Case, "gather", below=8192)
    lookup = lambda table, ids: jnp.take(table, ids, axis=0)  # noqa: E731
    table, ids = "f32[8192@x,128]", "i32[32,64]"
    yield c("embedding, vocabulary", lookup, f"{table}, {ids} -> f32[32,64,128]")
    two = f"{table}, i32[32@y,64] -> f32[32@y,64,128]"
    yield c("embedding, vocabulary and batch", lookup, two)
    one = f"{table}, i32[32@x,64] -> f32[32@x,64,128]"
    yield c("embedding, both on one axis", lookup, one)
    yield c("embedding, features", lookup, f"f32[8192,128@x], {ids} -> f32[32,64,128@x]")
    yield c("embedding, batch", lookup, "f32[8192,128], i32[32@x,64] -> f32[32@x,64,128]")
    pick = lambda x, i: jnp.take_along_axis(x, i, axis=1)  # noqa: E731
    c = functools.partial(Case, "take_along_axis", below=4096)
    yield c("batch", pick, "f32[256@x,4096], i32[256@x,16] -> f32[256@x,16]")
    yield c("sharded dim", pick, "f32[256,4096@x], i32[256,16] -> f32[256,16]")
    c = functools.partial(Case, "scatter", below=8192)
    add = lambda table, i, rows: table.at[i].add(rows)  # noqa: E731
    rows = "f32[2048,128]"
    yield c("add, table", add, f"{table}, i32[2048], {rows} -> {table}")
    yield c("add, rows", add, "f32[8192,128], i32[2048@x], f32[2048@x,128] -> f32[8192,128]")
    yield c("add, table and rows", add, f"{table}, i32[2048@y], f32[2048@y,128] -> {table}")
    yield c("add, both on one axis", add, f"{table}, i32[2048@x], f32[2048@x,128] -> {table}")
    put = lambda table, i, rows: table.at[i].set(rows)  # noqa: E731
    yield c("set, table", put, f"{table}, i32[2048], {rows} -> {table}")
    backward = lambda t, i, g: jax.vjp(lambda t: lookup(t, i), t)[1](g)[0]  # noqa: E731
    types = f"{table}, i32[32@y,64], f32[32@y,64,128] -> {table}"
    yield c("gradient of an embedding", backward, types)


def _dynamic() -> Iterator[Case]:
    c = functools.partial(Case, "dynamic_slice", below=2000)
    cut = lambda n, late=0: lambda x, i: lax.dynamic_slice_in_dim(x, i + late, n)  # noqa: E731
    yield c("4 rows", cut(4), f"{ROWS}, i32[] -> f32[4,512]", True)
    yield c("x[i]", lambda x, i: x[i], f"{ROWS}, i32[] -> f32[512]", True)
    yield c("64 rows, result split", cut(64), f"{ROWS}, i32[] -> f32[64@x,512]", True)
    yield c("64 rows, start too late", cut(64, 9999), f"{ROWS}, i32[] -> f32[64@x,512]", True)
    yield c("half, result split", cut(1024), f"{ROWS}, i32[] -> f32[1024@x,512]")
    free = lambda x, i: lax.dynamic_slice_in_dim(x, i // 5, 64, 1)  # noqa: E731
    yield c("free dim", free, f"{ROWS}, i32[] -> f32[2048@x,64]")
    c = functools.partial(Case, "dynamic_update_slice", below=2000)
    put = lambda x, y, i: lax.dynamic_update_slice_in_dim(x, y, i, 0)  # noqa: E731
    yield c("4 rows", put, f"{ROWS}, f32[4,512], i32[] -> {ROWS}")
    yield c("one row", lambda x, y, i: x.at[i].set(y), f"{ROWS}, f32[512], i32[] -> {ROWS}")
    yield c("256 rows, split", put, f"{ROWS}, f32[256@x,512], i32[] -> {ROWS}")
    late = lambda x, y, i: put(x, y, i + 9999)  # noqa: E731
    yield c("256 rows, start too late", late, f"{ROWS}, f32[256@x,512], i32[] -> {ROWS}")


# ----------------------------------------------------------------------------------------- by order


def _sorts() -> Iterator[Case]:
    c = functools.partial(Case, "sort")
    x, i = "f32[1024@x,256]", "i32[1024@x,256]"
    yield c("other dim", lambda x: jnp.sort(x, axis=1), f"{x} -> {x}")
    yield c("sharded dim", lambda x: jnp.sort(x, axis=0), f"{x} -> {x}")
    yield c("sharded dim, argsort", lambda x: jnp.argsort(x, axis=0), f"{x} -> {i}")
    pairs = lambda x, y: lax.sort((x, y), dimension=0, num_keys=1)  # noqa: E731
    yield c("sharded dim, two operands", pairs, f"{x}, {x} -> {x}, {x}")
    yield c("rank 1", jnp.sort, "f32[131072@x] -> f32[131072@x]")
    yield c("rank 1, argsort", jnp.argsort, "f32[131072@x] -> i32[131072@x]")


def _extremes() -> Iterator[Case]:
    c = functools.partial(Case, "top_k")
    top = lambda x: lax.top_k(x, 8)  # noqa: E731
    yield c("batch", top, "f32[256@x,4096] -> f32[256@x,8], i32[256@x,8]", True)
    yield c("sharded dim", top, "f32[64,16384@x] -> f32[64,8], i32[64,8]", True)
    yield c("rank 1", top, "f32[1048576@x] -> f32[8], i32[8]", True)
    near = lambda x: lax.approx_max_k(x, 8)  # noqa: E731
    yield c("approximate, batch", near, "f32[64@x,4096] -> f32[64@x,8], i32[64@x,8]")
    yield c("approximate, sharded dim", near, "f32[16,16384@x] -> f32[16,8], i32[16,8]")
    c = functools.partial(Case, "argmax")
    yield c("batch", lambda x: jnp.argmax(x, 1), "f32[256@x,4096] -> i32[256@x]")
    yield c("sharded dim", lambda x: jnp.argmax(x, 1), "f32[64,16384@x] -> i32[64]")
    yield c("argmin, rank 1", jnp.argmin, "f32[1048576@x] -> i32[]")


def _cumulative() -> Iterator[Case]:
    x = "f32[512@x,64]"  # XLA takes the square of these rows
    for op in (lax.cumsum, lax.cumprod, lax.cummax, lax.cummin, lax.cumlogsumexp):
        c = functools.partial(Case, op.__name__, named=op is lax.cumsum, draw=positive)
        yield c("sharded dim", op, f"{x} -> {x}")
        yield c("reverse", functools.partial(op, reverse=True), f"{x} -> {x}")
        if op is lax.cumsum:
            other = functools.partial(op, axis=1)
            yield c("batch", other, "f32[128@x,2048] -> f32[128@x,2048]")
            yield c("rank 1", op, "f32[8192@x] -> f32[8192@x]")


# ------------------------------------------------------------------------- transforms and matrices


def _ffts() -> Iterator[Case]:
    c = functools.partial(Case, "fft")
    x = "c64[256@x,1024]"
    yield c("batch", jnp.fft.fft, f"{x} -> {x}", True)
    yield c("inverse, batch", jnp.fft.ifft, f"{x} -> {x}", True)
    yield c("real, batch", jnp.fft.rfft, "f32[256@x,1024] -> c64[256@x,513]", True)
    yield c("inverse real, batch", jnp.fft.irfft, "c64[256@x,513] -> f32[256@x,1024]", True)
    yield c("two dims, batch", jnp.fft.fft2, "c64[16@x,128,128] -> c64[16@x,128,128]", True)
    yield c("sharded dim", jnp.fft.fft, "c64[256,1024@x] -> c64[256,1024@x]")
    yield c("rank 1", jnp.fft.fft, "c64[65536@x] -> c64[65536@x]")
    one = "c64[16,128@x,128]"
    yield c("two dims, one split", jnp.fft.fft2, f"{one} -> {one}")
    yield c("two dims, other split", jnp.fft.fft2, "c64[16,128,128@x] -> c64[16,128,128@x]")
    both = "c64[16,128@x,128@y]"
    yield c("two dims, both split", jnp.fft.fft2, f"{both} -> {both}")
    yield c("two dims, no batch", jnp.fft.fft2, "c64[512@x,512] -> c64[512@x,512]")


def _solve(a: jax.Array, b: jax.Array) -> jax.Array:
    return lax.linalg.triangular_solve(a, b, left_side=True, lower=True)


def _tridiagonal(d: jax.Array, b: jax.Array) -> jax.Array:
    off = 0.1 * jnp.ones_like(d)
    return lax.linalg.tridiagonal_solve(off.at[..., 0].set(0), d, off.at[..., -1].set(0), b)


def _batched_linalg() -> Iterator[Case]:
    c = functools.partial(Case, "linalg, batch", draw=definite)
    a, v = "f32[32@x,48,48]", "f32[32@x,48]"
    yield c("cholesky", jnp.linalg.cholesky, f"{a} -> {a}")
    yield c("triangular_solve", _solve, f"{a}, f32[32@x,48,16] -> f32[32@x,48,16]")
    yield c("lu", lambda x: lax.linalg.lu(x)[0], f"{a} -> {a}")
    yield c("qr", jnp.linalg.qr, f"{a} -> {a}, {a}")
    yield c("eigh", jnp.linalg.eigh, f"{a} -> {v}, {a}")
    yield c("svd", jnp.linalg.svd, f"{a} -> {a}, {v}, {a}")
    yield c("eig", jnp.linalg.eigvals, f"{a} -> c64[32@x,48]")
    yield c("solve", jnp.linalg.solve, f"{a}, f32[32@x,48,16] -> f32[32@x,48,16]")
    yield c("inverse", jnp.linalg.inv, f"{a} -> {a}")
    thin = "f32[32@x,256], f32[32@x,256,8] -> f32[32@x,256,8]"
    yield c("tridiagonal_solve", _tridiagonal, thin, draw=positive)


def _split_linalg() -> Iterator[Case]:
    c = functools.partial(Case, "linalg, matrix dim", draw=definite)
    a, v = "f32[32,48@x,48]", "f32[32,48]"
    both = "f32[32,48@x,48@y]"
    yield c("cholesky, rows", jnp.linalg.cholesky, f"{a} -> {a}")
    yield c("cholesky, both", jnp.linalg.cholesky, f"{both} -> {both}")
    free = "f32[32,48,48], f32[32,48,64@x] -> f32[32,48,64@x]"
    yield c("triangular_solve, right sides", _solve, free)
    rows = "f32[32,48@x,48], f32[32,48@x,64] -> f32[32,48@x,64]"
    yield c("triangular_solve, rows", _solve, rows)
    yield c("lu, rows", lambda x: lax.linalg.lu(x)[0], f"{a} -> {a}")
    yield c("qr, rows", jnp.linalg.qr, f"{a} -> {a}, f32[32,48,48]")
    yield c("eigh, rows", jnp.linalg.eigh, f"{a} -> {v}, {a}")
    yield c("svd, rows", jnp.linalg.svd, f"{a} -> {a}, {v}, f32[32,48,48]")
    yield c("cholesky, no batch", jnp.linalg.cholesky, "f32[256@x,256] -> f32[256@x,256]")


# ---------------------------------------------------------------------------------------- the rest


def _random() -> Iterator[Case]:
    c = functools.partial(Case, "random", below=2**31 - 1)
    x = "f32[1024@x,512]"
    yield c("bits", lambda k: jax.random.bits(k, (1024, 512)), "u32[2] -> u32[1024@x,512]")
    yield c("uniform", lambda k: jax.random.uniform(k, (1024, 512)), f"u32[2] -> {x}")
    yield c("normal", lambda k: jax.random.normal(k, (1024, 512)), f"u32[2] -> {x}")
    drop = lambda k, x: jnp.where(jax.random.bernoulli(k, 0.9, x.shape), x, 0)  # noqa: E731
    yield c("dropout", drop, f"u32[2], {x} -> {x}")
    typed = functools.partial(jax.random.wrap_key_data, impl="rbg")
    rbg = lambda k: jax.random.bits(typed(k), (1024, 512))  # noqa: E731
    yield c("bits of rbg", rbg, "u32[4] -> u32[1024@x,512]")
    pick = lambda k, x: jax.random.categorical(k, x, axis=1)  # noqa: E731
    yield c("categorical, sharded dim", pick, "u32[2], f32[64,4096@x] -> i32[64]")


def _larger(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(jnp.abs(a) < jnp.abs(b), b, a)


def _normalize(x: jax.Array) -> jax.Array:
    return (x - x.mean(1, keepdims=True)) * lax.rsqrt(x.var(1, keepdims=True) + 1e-6)


def _reductions() -> Iterator[Case]:
    c = functools.partial(Case, "reduce")
    x = "f32[256,4096@x]"
    user = lambda x: lax.reduce(x, np.float32(0), _larger, (1,))  # noqa: E731
    yield c("a user's function", user, f"{x} -> f32[256]")
    yield c("product", lambda x: jnp.prod(x, 1), f"{x} -> f32[256]", draw=positive)
    yield c("xor", lambda x: lax.reduce_xor_p.bind(x, axes=(1,)), "i32[256,4096@x] -> i32[256]")
    yield c("logsumexp", lambda x: jax.nn.logsumexp(x, 1), f"{x} -> f32[256]")
    yield c("normalization", _normalize, f"{x} -> {x}")
    yield c("all, two axes", jnp.sum, "f32[1024@x,512@y] -> f32[]")


def _affine(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> Any:
    return b[0] * a[0], b[0] * a[1] + b[1]


def _recur(x: jax.Array, w: jax.Array, reverse: bool = False) -> Any:
    def step(h: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = jnp.tanh(h @ w + row)
        return h, h

    return lax.scan(step, jnp.zeros(x.shape[1:]), x, reverse=reverse)


def _branch(i: jax.Array, x: jax.Array) -> jax.Array:
    return lax.cond(i > 0, lambda x: jnp.cumsum(x, 0), lambda x: x - x.sum(1, keepdims=True), x)


def _loops() -> Iterator[Case]:
    c = functools.partial(Case, "associative_scan")
    x = "f32[512@x,32]"
    yield c("sum", lambda x: lax.associative_scan(jnp.add, x), f"{x} -> {x}")
    both = lambda a, b: lax.associative_scan(_affine, (a, b))  # noqa: E731
    yield c("recurrence", both, f"{x}, {x} -> {x}, {x}", draw=positive)
    y = "f32[512,128@x]"
    yield c("recurrence, batch", both, f"{y}, {y} -> {y}, {y}", draw=positive)
    c = functools.partial(Case, "scan")
    w, end = "f32[64,64]", "f32[32,64]"
    long = f"f32[64@x,32,64], {w} -> {end}, f32[64@x,32,64]"
    yield c("leading dim", _recur, long)
    yield c("leading dim, reverse", functools.partial(_recur, reverse=True), long)
    batch = f"f32[64,32@x,64], {w} -> f32[32@x,64], f32[64,32@x,64]"
    yield c("batch", _recur, batch)
    power = lambda x: lax.fori_loop(0, 8, lambda _, x: jnp.tanh(x @ x / 256), x)  # noqa: E731
    yield c("loop over a sharded carry", power, "f32[256@x,256] -> f32[256@x,256]")
    c = functools.partial(Case, "cond")
    yield c("branches that differ", _branch, "i32[], f32[1024@x,256] -> f32[1024@x,256]")


def _uneven() -> Iterator[Case]:
    """Dims that their axes do not divide."""
    c = functools.partial(Case, "uneven")
    w = "f32[3,3,16,16]"
    yield c("convolution", _conv(), f"f32[4,125@x,32,16], {w} -> f32[4,125@x,32,16]")
    valid = _conv(padding="VALID")
    yield c("convolution, no padding", valid, f"f32[4,128@x,32,16], {w} -> f32[4,126@x,30,16]")
    third = _conv((3, 3))
    yield c("convolution, stride 3", third, f"f32[4,128@x,32,16], {w} -> f32[4,43@x,11,16]")
    x = "f32[4,125@x,32,16]"
    yield c("weight gradient", _pulled(_conv(), 1), f"{x}, {w}, {x} -> {w}")
    x, half = "f32[4,125@x,64,16]", "f32[4,63@x,32,16]"
    yield c("max pooling", _pool("max", 3, 2), f"{x} -> {half}")
    yield c("its gradient", _pool_gradient(_pool("max", 3, 2)), f"{x}, {half} -> {x}")
    x = "f32[2045@x,256]"
    yield c("slice", lambda x: x[5:-7], f"{x} -> f32[2033@x,256]")
    yield c("every third row", lambda x: x[::3], f"{x} -> f32[682@x,256]")
    yield c("roll", lambda x: jnp.roll(x, 3, 0), f"{x} -> {x}")
    yield c(
        "concatenate", lambda *x: jnp.concatenate(x), f"f32[1000@x,256], f32[1045@x,256] -> {x}"
    )
    yield c("rev", lambda x: jnp.flip(x, 0), f"{x} -> {x}")
    yield c("x[i]", lambda x, i: x[i], f"{x}, i32[] -> f32[256]", True, below=2045)
    yield c("sort", lambda x: jnp.sort(x, 0), f"{x} -> {x}")
    top = lambda x: lax.top_k(x, 8)  # noqa: E731
    yield c("top_k", top, "f32[64,16381@x] -> f32[64,8], i32[64,8]", True)
    y = "f32[509@x,64]"
    yield c("cumsum", lambda x: jnp.cumsum(x, 0), f"{y} -> {y}", True, draw=positive)
    yield c("cumsum, reverse", lambda x: lax.cumsum(x, 0, True), f"{y} -> {y}", True, draw=positive)
    yield c("fft, batch", jnp.fft.fft, "c64[250@x,1024] -> c64[250@x,1024]", True)
    yield c("fft, sharded dim", jnp.fft.fft, "c64[256,1021@x] -> c64[256,1021@x]")
    a = "f32[30@x,48,48]"
    yield c("cholesky, batch", jnp.linalg.cholesky, f"{a} -> {a}", draw=definite)
    yield c("random bits", lambda k: jax.random.bits(k, (1021, 512)), "u32[2] -> u32[1021@x,512]")
