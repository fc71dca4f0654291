"""One use or more of every primitive in the rule table, for the brute-force check.

Sizes are small, differ from dim to dim, and mostly are not multiples of both 2 and 3, so that every
factor is split evenly and unevenly.
"""

import functools
import importlib.util
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend.core import primitives
from jax.extend.random import threefry2x32_p, threefry_prng_impl

from gspmd._compat import generator_primitive
from gspmd.ir import Op, Value
from gspmd.rules.cases import Case, Sample
from gspmd.rules.stretch import stretches_of


def floats(*shape: int, low: float = -1.0, high: float = 1.0, dtype: Any = np.float32) -> Any:
    """Numbers in [low, high), the same for a shape every time."""
    return np.random.default_rng(shape).uniform(low, high, shape).astype(dtype)


def ints(*shape: int, low: int = 0, high: int = 8, dtype: Any = np.int32) -> Any:
    return np.random.default_rng(shape).integers(low, high, shape).astype(dtype)


def bools(*shape: int) -> Any:
    return ints(*shape, high=2).astype(bool)


def samples() -> Iterator[Sample | Case]:
    """All samples, family by family."""
    for family in (
        _unary, _nary, _other_pointwise, _contractions, _reductions, _windows, _broadcasts,
        _reshapes, _slices, _gathers, _scatters, _dynamic_slices, _random, _order, _linalg,
    ):  # fmt: skip
        yield from family()


# --- pointwise


def _unary() -> Iterator[Sample | Case]:
    positive = floats(5, low=0.1, high=0.9)
    for fn in (
        lax.abs, lax.acos, lax.asin, lax.asinh, lax.atan, lax.atanh, lax.bessel_i0e, lax.bessel_i1e,
        lax.cbrt, lax.ceil, lax.cos, lax.cosh, lax.digamma, lax.erf, lax.erf_inv, lax.erfc, lax.exp,
        lax.exp2, lax.expm1, lax.floor, lax.is_finite, lax.lgamma, lax.log, lax.log1p, lax.logistic,
        lax.neg, lax.round, lax.rsqrt, lax.sign, lax.sin, lax.sinh, lax.sqrt, lax.square, lax.tan,
        lax.tanh, lax.stop_gradient,
    ):  # fmt: skip
        yield Sample(fn.__name__, fn, (positive,))
    yield Sample("acosh", lax.acosh, (1 + positive,))
    yield Sample("integer_pow", lambda x: lax.integer_pow(x, 3), (positive,))
    yield Sample("reduce_precision", lambda x: lax.reduce_precision(x, 5, 7), (positive,))
    layout = Layout(major_to_minor=(1, 0))
    yield Sample("layout_constraint", lambda x: with_layout_constraint(x, layout), (floats(4, 5),))
    yield Sample("copy", lambda x: jnp.array(x, copy=True), (positive,))
    yield Sample("name", lambda x: checkpoint_name(x, "x"), (positive,))
    z = floats(5) + 1j * floats(5, low=0.0)
    for fn in (lax.real, lax.imag, lax.conj):
        yield Sample(fn.__name__, fn, (z.astype(np.complex64),))
    yield Sample("clz", lax.clz, (ints(5, high=99),))
    yield Sample("not", lax.bitwise_not, (ints(5),))
    yield Sample("population_count", lax.population_count, (ints(5, high=99),))


def _nary() -> Iterator[Sample | Case]:
    x, y, z = (floats(5, low=low, high=2.0) for low in (0.2, 0.3, 0.4))
    z = np.flip(z)
    for name, fn in {
        "atan2": lax.atan2, "div": lax.div, "mul": lax.mul, "sub": lax.sub, "pow": lax.pow,
        "rem": lax.rem, "nextafter": lax.nextafter, "igamma": lax.igamma, "igammac": lax.igammac,
        "igamma_grad_a": lax.igamma_grad_a, "complex": lax.complex, "max": lax.max, "min": lax.min,
        "eq": lax.eq, "ne": lax.ne, "ge": lax.ge, "gt": lax.gt, "le": lax.le, "lt": lax.lt,
    }.items():  # fmt: skip
        yield Sample(name, fn, (x, np.flip(y)))
    for name, primitive in (
        ("eq_to", primitives.eq_to_p), ("le_to", primitives.le_to_p), ("lt_to", primitives.lt_to_p),
        ("add_any", primitives.add_jaxvals_p),
    ):  # fmt: skip
        yield Sample(name, primitive.bind, (x, np.flip(y)))
    yield Sample("add", lax.add, (x, z))
    yield Sample("add", lambda x: x + 1.5, (x,))
    yield Sample("max", lax.max, (floats(1, 4), floats(5, 4)))  # a stretched dim
    yield Sample("zeta", lax.zeta, (1 + x, z))
    yield Sample("polygamma", lax.polygamma, (np.floor(x), z))
    yield Sample("regularized_incomplete_beta", lax.betainc, (x, y, np.flip(z) / 2))
    yield Sample("div", lax.div, (ints(5, low=-9, high=9), ints(5, low=2)))
    yield Sample("mulhi", lax.mulhi, (ints(5, high=2**31 - 1), ints(5, high=2**31 - 1)))
    bits = (ints(5), np.flip(ints(5)))
    for name, fn in {
        "and": lax.bitwise_and, "or": lax.bitwise_or, "xor": lax.bitwise_xor,
        "shift_left": lax.shift_left, "shift_right_logical": lax.shift_right_logical,
        "shift_right_arithmetic": lax.shift_right_arithmetic,
    }.items():  # fmt: skip
        yield Sample(name, fn, bits)


def _other_pointwise() -> Iterator[Sample | Case]:
    x, y = floats(4, 5), np.flip(floats(4, 5))
    yield Sample("select_n", lax.select_n, (ints(4, 5, high=3), x, y, x + y))
    yield Sample("select_n", lax.select_n, (np.bool_(True), x, y))
    yield Sample("clamp", lambda x: lax.clamp(-0.5, x, 0.5), (x,))
    yield Sample("clamp", lax.clamp, (np.minimum(x, y), x, np.maximum(x, y)))
    for dtype in (jnp.bfloat16, np.int32, np.complex64):
        yield Sample(
            "convert_element_type", lambda x, t=dtype: lax.convert_element_type(x, t), (x,)
        )
    half = ints(4, 5).astype(jnp.bfloat16)
    yield Sample("convert_element_type", lambda x: x.astype(np.float32), (half,))
    for dtype in (np.int32, np.uint8):
        yield Sample(
            "bitcast_convert_type", lambda x, t=dtype: lax.bitcast_convert_type(x, t), (x,)
        )
    narrow = ints(4, 5, 2, dtype=np.uint16)
    yield Sample(
        "bitcast_convert_type", lambda x: lax.bitcast_convert_type(x, np.float32), (narrow,)
    )
    a, b = (Value(i, (4, 5), np.dtype("f4")) for i in range(2))
    yield Case(Op("constraint", (a,), (b,), call=lambda x: x), (x,))
    yield Sample("optimization_barrier", lambda *x: lax.optimization_barrier(x), (x, ints(3)))
    yield Sample("device_put", jax.device_put, (x,))
    if importlib.util.find_spec("jax.experimental.shard_alike"):  # not since JAX 0.12
        yield Sample("shard_alike", _shard_alike, (x, y))
    polynomial: Any = getattr(lax, "polynomial", None)
    if polynomial:  # since JAX 0.12
        yield Sample("polynomial", lambda x, a: polynomial(x, [1.0, 2.0, a]), (x, y))


def _shard_alike(x: Any, y: Any) -> Any:
    from jax.experimental.shard_alike import shard_alike

    return shard_alike(x, y)


# --- contractions


def _scaled_dots() -> Iterator[Sample]:
    f8 = jnp.float8_e4m3fn
    lhs, rhs = (floats(2, n, 93, low=-4.0, high=4.0, dtype=f8) for n in (5, 6))

    def scale(*shape: int) -> Any:
        return (2.0 ** ints(*shape, low=-2, high=3)).astype(jnp.float8_e8m0fnu)

    for left, right in (
        (scale(2, 5, 3), scale(2, 6, 3)), (scale(2, 5, 3), None), (scale(2, 5, 3), scale(2, 6, 31)),
    ):  # fmt: skip
        product = functools.partial(
            lax.scaled_dot,
            lhs_scale=left,
            rhs_scale=right,
            dimension_numbers=(((2,), (2,)), ((0,), (0,))),
            preferred_element_type=np.float32,
        )
        yield Sample("scaled_dot", product, (lhs, rhs))


def _contractions() -> Iterator[Sample | Case]:
    dot = functools.partial(Sample, "dot_general")
    yield dot(jnp.matmul, (floats(4, 5), floats(5, 3)))
    yield dot(
        lambda a, b: jnp.einsum("bik,bjkl->bijl", a, b), (floats(4, 2, 5), floats(4, 3, 5, 2))
    )
    yield dot(lambda a, b: jnp.einsum("kil,lbk->bi", a, b), (floats(4, 3, 5), floats(5, 2, 4)))
    yield dot(lambda a, b: lax.dot_general(a, b, (((), ()), ((), ()))), (floats(4), floats(5)))
    yield from _scaled_dots()
    sizes = np.array([1, 3, 2], np.int32)
    ragged = functools.partial(Sample, "ragged_dot_general")
    yield ragged(lax.ragged_dot, (floats(6, 4), floats(3, 4, 5), sizes))
    over = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    yield ragged(
        lambda a, b, n: lax.ragged_dot_general(a, b, n, over), (floats(6, 4), floats(6, 5), sizes)
    )

    same: dict[str, Any] = {"window_strides": (1, 1), "padding": "SAME"}

    def conv(lhs: Any, rhs: Any, layout: tuple[str, str, str], **options: Any) -> Sample:
        return Sample(
            "conv_general_dilated",
            lambda a, b: lax.conv_general_dilated(
                a, b, dimension_numbers=layout, **{**same, **options}
            ),
            (lhs, rhs),
        )

    yield conv(floats(4, 5, 6, 6), floats(3, 5, 3, 3), ("NCHW", "OIHW", "NCHW"))
    yield conv(floats(5, 6, 6, 4), floats(3, 3, 4, 2), ("NHWC", "HWIO", "NHWC"))
    nhwc = ("NHWC", "HWIO", "NHWC")
    yield conv(floats(5, 6, 6, 4), floats(3, 3, 2, 6), nhwc, feature_group_count=2)
    yield conv(floats(4, 6, 6, 3), floats(3, 3, 3, 6), nhwc, batch_group_count=2)
    yield conv(
        floats(2, 11, 9, 3), floats(3, 2, 3, 2), nhwc, window_strides=(2, 1),
        padding=((3, 1), (-1, 5)), lhs_dilation=(3, 2), rhs_dilation=(2, 4),
    )  # fmt: skip
    # The gradient of a kernel: the window is larger than the result.
    yield conv(floats(2, 11, 9, 3), floats(9, 7, 3, 2), nhwc, padding="VALID", rhs_dilation=(1, 1))


# --- reductions


def _reductions() -> Iterator[Sample | Case]:
    x = floats(4, 5, 3)
    for name, fn in {
        "reduce_sum": jnp.sum, "reduce_max": jnp.max, "reduce_min": jnp.min,
        "reduce_prod": jnp.prod, "argmax": jnp.argmax, "argmin": jnp.argmin,
    }.items():  # fmt: skip
        yield Sample(name, functools.partial(fn, axis=1), (x,))
    yield Sample("reduce_sum", jnp.sum, (x,))
    yield Sample("reduce_max", lambda x: jnp.max(x, axis=(0, 2)), (ints(4, 5, 3),))
    mask = bools(4, 5)
    for name, primitive in (
        ("reduce_and", primitives.reduce_and_p), ("reduce_or", primitives.reduce_or_p),
        ("reduce_xor", primitives.reduce_xor_p),
    ):  # fmt: skip
        for bits in (mask, ints(4, 5)):
            yield Sample(name, lambda x, p=primitive: p.bind(x, axes=(0,)), (bits,))

    def larger(a: Any, b: Any) -> Any:
        first = a[0] >= b[0]
        return lax.select(first, a[0], b[0]), lax.select(first, a[1], b[1])

    yield Sample(
        "reduce",
        lambda x, i: lax.reduce((x, i), (np.float32(-9), np.int32(0)), larger, (1,)),
        (floats(4, 6), ints(4, 6)),
    )
    for fn in (lax.cumsum, lax.cumprod, lax.cummax, lax.cummin, lax.cumlogsumexp):
        yield Sample(fn.__name__, lambda x, fn=fn: fn(x, axis=1, reverse=True), (x,))


def _windows() -> Iterator[Sample | Case]:
    x = floats(4, 6, 5)
    pool = ((1, 2, 1), (1, 2, 1), "VALID")
    yield Sample("reduce_window_sum", lambda x: lax.reduce_window(x, 0.0, lax.add, *pool), (x,))
    for name, first, fn in (
        ("reduce_window_max", -np.inf, lax.max), ("reduce_window_min", np.inf, lax.min),
    ):  # fmt: skip
        yield Sample(
            name, lambda x, first=first, fn=fn: lax.reduce_window(x, first, fn, *pool), (x,)
        )
    yield Sample("reduce_window", lambda x: lax.reduce_window(x, 1.5, lax.add, *pool), (x,))

    line = floats(3, 13)
    for window, stride, padding in ((3, 1, (1, 1)), (2, 5, (0, 0)), (9, 2, (8, 3))):
        how: Any = {"window_dimensions": (1, window), "window_strides": (1, stride)}
        how["padding"] = ((0, 0), padding)

        def max_pool(x: Any, how: Any = how) -> Any:
            return lax.reduce_window(x, -jnp.inf, lax.max, **how)

        yield Sample("reduce_window_max", max_pool, (line,))
        dilated = how | {"base_dilation": (1, 3), "window_dilation": (1, 2)}
        yield Sample(
            "reduce_window_sum",
            lambda x, d=dilated: lax.reduce_window(x, 0.0, lax.add, **d),
            (line,),
        )
        yield Sample(
            "select_and_scatter_add", lambda x, p=max_pool: jax.vjp(p, x)[1](p(x)), (line,)
        )

    def halves(x: Any) -> Any:
        return lax.reduce_window(x, -jnp.inf, lax.max, *pool)

    yield Sample("select_and_scatter_add", lambda x: jax.vjp(halves, x)[1](halves(x)), (x,))
    yield Sample("select_and_gather_add", lambda x: jax.jvp(halves, (x,), (2 * x,)), (x,))
    yield Sample("select_and_scatter", _select_and_scatter, (x, halves(x)))


def _select_and_scatter(x: Any, source: Any) -> Any:
    select = jax.make_jaxpr(lax.ge)(0.0, 0.0)
    scatter = jax.make_jaxpr(lax.max)(0.0, 0.0)
    return primitives.select_and_scatter_p.bind(
        x, source, np.float32(-9),
        select_jaxpr=select.jaxpr, select_consts=(), scatter_jaxpr=scatter.jaxpr, scatter_consts=(),
        window_dimensions=(1, 2, 1), window_strides=(1, 2, 1), padding=((0, 0),) * 3,
    )  # fmt: skip


# --- shapes


def _broadcasts() -> Iterator[Sample | Case]:
    broadcast = functools.partial(Sample, "broadcast_in_dim")
    yield broadcast(lambda x: lax.broadcast_in_dim(x, (3, 4, 5), (1, 2)), (floats(4, 5),))
    yield broadcast(lambda x: lax.broadcast_in_dim(x, (4, 3, 5), (0, 2)), (floats(1, 5),))
    yield broadcast(lambda: lax.full((4, 5), 2.0))
    for dtype in (np.int32, jnp.bfloat16, np.uint8):
        yield Sample("iota", lambda t=dtype: lax.broadcasted_iota(t, (4, 301), 1))
    yield Sample("empty", lambda: lax.empty((4, 5), np.float32))
    yield Sample(
        "empty2", lambda: primitives.empty2_p.bind(dtype=np.dtype("f4"), memory_space=_ANY)
    )
    either = functools.partial(lax.platform_dependent, cpu=jnp.sin, default=jnp.cos)
    yield Sample("platform_index", either, (floats(4),))


_ANY = jax.memory.Space.Device


def _reshapes() -> Iterator[Sample | Case]:
    for old, new in (
        ((6, 5), (2, 3, 5)), ((4, 5), (20,)), ((6, 4), (4, 6)), ((1, 6, 5), (6, 1, 5)),
        ((3, 4, 2), (2, 12)), ((12, 5), (2, 3, 2, 5)), ((6, 10), (4, 15)), ((5,), (1, 5)),
    ):  # fmt: skip
        yield Sample("reshape", lambda x, new=new: lax.reshape(x, new), (floats(*old),))
    yield Sample("reshape", lambda x: lax.reshape(x, (20,), (1, 0)), (floats(4, 5),))
    yield Sample("transpose", lambda x: lax.transpose(x, (2, 0, 1)), (floats(4, 5, 3),))
    yield Sample("squeeze", lambda x: lax.squeeze(x, (1,)), (floats(4, 1, 5),))
    x, y = floats(4, 5), floats(4, 3)
    yield Sample("concatenate", lambda *x: lax.concatenate(x, 1), (x, y))
    yield Sample("stack", lambda *x: jnp.stack(x, 1), (x, np.flip(x)))
    yield Sample("unstack", lambda x: jnp.unstack(x, axis=1), (x,))
    yield Sample("split", lambda x: lax.split(x, (2, 3), 1), (x,))
    yield Sample("tile", lambda x: lax.tile(x, (1, 2)), (x,))
    yield Sample("rev", lambda x: lax.rev(x, (1,)), (floats(4, 5, 3),))


def _slices() -> Iterator[Sample | Case]:
    x = floats(4, 6, 5)
    yield Sample("slice", lambda x: lax.slice(x, (0, 1, 0), (4, 6, 5), (1, 2, 1)), (x,))
    yield Sample("slice", lambda x: lax.slice(x, (0, 1, 0), (4, 6, 5), (1, 3, 1)), (x,))
    yield Sample("slice", lambda x: lax.slice(x, (0, 1, 0), (4, 3, 5)), (x,))
    yield Sample(
        "pad", lambda x: lax.pad(x, np.float32(0), ((0, 0, 0), (1, 0, 1), (0, 0, 0))), (x,)
    )
    line = floats(29, 3)
    yield Sample("slice", lambda x: x[5:22], (line,))
    yield Sample("slice", lambda x: x[2:29:3], (line,))
    for low, high, inside in ((20, 1, 0), (-9, 30, 0), (3, -2, 2), (-4, -4, 1)):
        config = ((low, high, inside), (0, 0, 0))
        yield Sample("pad", lambda x, c=config: lax.pad(x, np.float32(7), c), (line,))
    yield Sample("tile", lambda x: lax.tile(x, (3, 1)), (line,))
    yield Sample("rev", lambda x: lax.rev(x, (0,)), (line,))
    yield Sample("concatenate", lambda x, y: lax.concatenate([x, y, x], 0), (line, floats(4, 3)))
    yield Sample("split", lambda x: lax.split(x, (9, 0, 20)), (line,))
    yield _splice(line, floats(4, 3))
    padding = ((1, 0, 0), (2, -1, 0), (0, 0, 0))
    yield Sample("pad", lambda x, y: lax.pad(x, y, padding), (x, np.float32(2)))


def _splice(x: Any, y: Any) -> Case:
    """Stretches of two operands, one of them twice: nothing in JAX, so the op is written out."""
    stretches = ((0, 20, 29), (1, 1, 4), (0, 0, 13))
    values = [Value(i, n, np.dtype(np.float32)) for i, n in enumerate((x.shape, y.shape, (25, 3)))]
    params = {"dimension": 0, "stretches": stretches}
    op = Op("splice", tuple(values[:2]), tuple(values[2:]), params, call=stretches_of)
    return Case(op, (x, y))


# --- indexing


def _gathers() -> Iterator[Sample | Case]:
    table, rows = floats(7, 5), ints(4, 3, low=-3, high=12)

    def take(x: Any, i: Any, mode: str, fill: Any = None) -> Any:
        numbers = lax.GatherDimensionNumbers((2,), (0,), (0,))
        sizes = (1, *x.shape[1:])
        return lax.gather(x, i[..., None], numbers, sizes, mode=mode, fill_value=fill)

    for mode in ("fill", "clip", "promise_in_bounds"):
        yield Sample("gather", lambda x, i, m=mode: take(x, i, m), (table, rows))
    yield Sample("gather", lambda x, i: take(x, i, "fill", 3), (ints(7, 5), rows.astype(np.int8)))
    yield Sample("gather", lambda x, i: take(x, i, "fill", 0), (table, abs(rows).astype(np.uint32)))
    yield Sample("gather", lambda x, i: take(x, i, "clip"), (bools(7, 5), rows))

    def gather(x: Any, i: Any, numbers: Any, sizes: tuple[int, ...], mode: str = "fill") -> Sample:
        return Sample("gather", lambda x, i: lax.gather(x, i, numbers, sizes, mode=mode), (x, i))

    points = lax.GatherDimensionNumbers((), (0, 1), (1, 0))
    yield gather(table, ints(5, 2, low=-1, high=7), points, (1, 1))
    yield gather(table, ints(5, 2, low=-1, high=7), points, (1, 1), "clip")
    kept = lax.GatherDimensionNumbers((1, 2), (), (0,))  # the row dim stays
    yield gather(table, ints(4, 1, high=9), kept, (1, 5))
    for mode in ("fill", "clip"):  # several rows at a time, more than a shard holds
        yield gather(table, ints(4, 1, low=-2, high=7), kept, (2, 5), mode)
        yield gather(table, ints(4, 1, low=-2, high=7), kept, (5, 5), mode)
    ahead = lax.GatherDimensionNumbers((0, 1), (), (1,))  # a start in one dim, not in the other
    yield gather(table, ints(5, 1, low=-1, high=5, dtype=np.int8), ahead, (4, 3))
    full = lax.GatherDimensionNumbers((1,), (0,), (0, 1))  # a full slice, sometimes out of bounds
    yield gather(table, ints(4, 2, high=2), full, (1, 5))
    along = lax.GatherDimensionNumbers((), (1,), (1,), (0,), (0,))
    yield gather(table, ints(7, 3, 1, low=-1, high=7), along, (1, 1))
    stretch = lax.GatherDimensionNumbers((1,), (), (1,), (0,), (1,))
    yield gather(table, ints(3, 7, 1, low=-1, high=5, dtype=np.uint16), stretch, (1, 3), "clip")
    keys, nowhere = jax.random.split(jax.random.key(3), 7), ints(4, 1, low=-1, high=9)
    point = lax.GatherDimensionNumbers((), (0,), (0,))
    yield gather(keys, nowhere, point, (1,))
    yield gather(keys, nowhere, point, (1,), "clip")
    narrow = floats(7, 5).astype(jnp.float8_e4m3fn)
    yield Sample("gather", lambda x, i: take(x, i, "fill", 0), (narrow, rows))
    yield Sample("gather", lambda x, i: take(x, i, "clip"), (ints(7, 5).astype(jnp.int4), rows))


def _scatters() -> Iterator[Sample | Case]:
    table, updates = floats(7, 5), floats(4, 3, 5)
    rows = ints(4, 3, 1, low=-3, high=12)
    numbers = lax.ScatterDimensionNumbers((2,), (0,), (0,))
    unique = np.array([5, -1, 0, 9, 3, 6, 8, 1, -2, 4, 12, 2], np.int32).reshape(4, 3, 1)

    def scatter(name: str, fn: Any, args: Any, numbers: Any = numbers, **options: Any) -> Sample:
        return Sample(name, lambda *xs: fn(*xs, numbers, **options), args)

    for mode in ("drop", "clip", "promise_in_bounds"):
        for name, fn in {
            "scatter-add": lax.scatter_add, "scatter-sub": lax.scatter_sub,
            "scatter-max": lax.scatter_max, "scatter-min": lax.scatter_min,
            "scatter-mul": lax.scatter_mul,
        }.items():  # fmt: skip
            yield scatter(name, fn, (table, rows, updates), mode=mode)
    yield scatter(
        "scatter", lax.scatter, (table, unique, updates), unique_indices=True, mode="drop"
    )
    yield scatter("scatter-max", lax.scatter_max, (ints(7, 5), rows, ints(4, 3, 5, high=20)))
    ordered = np.sort(ints(5, 1, high=7), 0)
    yield scatter(
        "scatter-add", lax.scatter_add, (table, ordered, floats(5, 5)),
        lax.ScatterDimensionNumbers((1,), (0,), (0,)), indices_are_sorted=True, mode="drop",
    )  # fmt: skip
    points = lax.ScatterDimensionNumbers((), (0, 1), (1, 0))
    yield scatter("scatter-add", lax.scatter_add, (table, ints(5, 2), floats(5)), points)
    kept = lax.ScatterDimensionNumbers((1, 2), (), (0,))
    yield scatter("scatter-add", lax.scatter_add, (table, ints(4, 1), floats(4, 1, 5)), kept)
    starts = ints(4, 1, low=-1, high=6, dtype=np.int8)
    for mode in ("drop", "clip"):
        for name, fn in (("scatter-add", lax.scatter_add), ("scatter-max", lax.scatter_max)):
            for taken in (2, 5):
                yield scatter(name, fn, (table, starts, floats(4, taken, 3)), kept, mode=mode)
    apart = (table, np.array([[0], [5], [3]], np.int32), floats(3, 2, 5))
    yield scatter("scatter", lax.scatter, apart, kept, unique_indices=True)
    middle = lax.ScatterDimensionNumbers((0, 2), (), (1,))
    yield scatter("scatter-mul", lax.scatter_mul, (table, ints(4, 1), floats(2, 4, 3)), middle)
    along = lax.ScatterDimensionNumbers((), (1,), (1,), (0,), (0,))
    yield scatter("scatter-add", lax.scatter_add, (table, ints(7, 3, 1), floats(7, 3)), along)
    yield scatter("scatter", lax.scatter, (table, ints(7, 1, 1), floats(7, 1)), along)
    one = lax.ScatterDimensionNumbers((), (0,), (0,))
    numbered = (bools(7), ints(6, 1, high=250, dtype=np.uint8), bools(6))
    yield scatter("scatter-max", lax.scatter_max, numbered, one, mode="clip")
    yield scatter("scatter-min", lax.scatter_min, numbered, one)
    keys = jax.random.split(jax.random.key(3), 9)
    yield scatter("scatter", lax.scatter, (keys[:7], np.array([[2], [-1], [6]]), keys[6:]), one)
    yield Sample(
        "scatter",
        lambda x, i: lax.scatter_apply(x, i, jnp.tanh, kept, update_shape=(4, 2, 5)),
        (table, starts),
    )


def _dynamic_slices() -> Iterator[Sample | Case]:
    x = floats(7, 5, 4)
    for start, rows in ((-2, 3), (1, 1), (3, 3), (1, 5), (9, 1), (6, 3)):
        yield Sample(
            "dynamic_slice",
            lambda x, i, n=rows: lax.dynamic_slice_p.bind(x, i, 0, 0, slice_sizes=(n, 5, 4)),
            (x, np.int32(start)),
        )
        yield Sample(
            "dynamic_update_slice",
            lambda x, y, i: lax.dynamic_update_slice_p.bind(x, y, i, np.int32(0), np.int32(1)),
            (x, floats(rows, 5, 2), np.int32(start)),
        )
    unsigned = (bools(9), np.uint8(200))
    yield Sample("dynamic_slice", lambda x, i: lax.dynamic_slice(x, (i,), (2,)), unsigned)
    keys, start = jax.random.split(jax.random.key(3), 7), np.int16(4)
    yield Sample("dynamic_slice", lambda x, i: lax.dynamic_slice(x, (i,), (5,)), (keys, start))
    yield Sample(
        "dynamic_update_slice",
        lambda x, y, i: lax.dynamic_update_slice(x, y, (i,)),
        (keys, keys[3:5], start),
    )
    corner = (floats(7, 6), np.int8(3), np.int8(-1))
    yield Sample("dynamic_slice", lambda x, *i: lax.dynamic_slice(x, i, (4, 5)), corner)


# --- random numbers


def _random() -> Iterator[Sample | Case]:
    key, keys = jax.random.key(7), jax.random.split(jax.random.key(8), 5)
    newer = {"threefry4x32": 8, "philox2x32": 3, "philox4x32": 6}  # than the oldest JAX that works
    hashes = {"threefry2x32": (threefry2x32_p, 4)}
    hashes |= {x: (p, n) for x, n in newer.items() if (p := generator_primitive(x))}
    for generator in (*hashes, "rbg", "unsafe_rbg"):
        one = jax.random.key(7, impl=generator)
        many = jax.random.split(one, 5)
        yield Sample("random_bits", lambda k: jax.random.bits(k, (4, 5)), (one,))
        yield Sample("random_bits", jax.vmap(lambda k: jax.random.bits(k, (3, 4))), (many,))
        yield Sample("random_split", jax.vmap(jax.random.split), (many,))
        data = np.arange(5, dtype="u4")
        yield Sample("random_fold_in", jax.vmap(jax.random.fold_in), (many, data))
        seed = functools.partial(jax.random.key, impl=generator)
        yield Sample("random_seed", jax.vmap(seed), (np.arange(5),))
    for dtype in (np.uint8, np.uint16, np.uint32):
        yield Sample("random_bits", lambda k, t=dtype: jax.random.bits(k, (4, 5, 3), t), (key,))
    yield Sample("random_split", lambda k: jax.random.split(k, 3), (key,))
    yield Sample(
        "random_fold_in", lambda k: jax.vmap(lambda k: jax.random.fold_in(k, 3))(k), (keys,)
    )
    yield Sample("random_wrap", jax.random.wrap_key_data, (jax.random.key_data(keys),))
    yield Sample("random_unwrap", jax.random.key_data, (keys,))
    yield Sample("random_clone", jax.random.clone, (keys,))
    alpha = floats(5, 4, low=0.5)
    yield Sample("random_gamma", jax.random.gamma, (key, alpha))
    yield Sample("random_gamma", jax.vmap(jax.random.gamma), (keys, alpha))
    words = tuple(ints(4, 5, high=2**31 - 1, dtype=np.uint32) for _ in range(8))
    for name, (primitive, count) in hashes.items():
        yield Sample(name, primitive.bind, words[:count])
    bits = threefry_prng_impl.random_bits
    yield Sample("iota_2x32_shape", lambda k: bits(k, 32, (5, 6)), (np.arange(2, dtype="u4"),))
    state = np.arange(4, dtype=np.uint32)
    yield Sample("rng_bit_generator", lambda k: lax.rng_bit_generator(k, (4, 5)), (state,))
    yield Sample("rng_uniform", lambda a, b: primitives.rng_uniform_p.bind(a, b, shape=(4, 5)),
                 (np.float32(0), np.float32(0)))  # fmt: skip


# --- order and linear algebra


def _order() -> Iterator[Sample | Case]:
    x = floats(4, 5, 6)
    yield Sample("sort", lambda x, y: lax.sort((x, y), dimension=1), (x, np.flip(x)))
    yield Sample("sort", lambda x: lax.sort(x), (ints(17),))
    zeros = np.array([0.0, -0.0, 2, -0.0, np.nan, 0.0, -np.inf, 1, -0.0, np.inf, -1], np.float32)
    order = np.arange(11, dtype=np.int32)
    yield Sample("sort", lambda x, y: lax.sort((x, y), num_keys=1), (zeros, order))
    yield Sample("sort", lambda x, y: lax.sort((x, y), num_keys=2), (ints(11, high=3), zeros))
    yield Sample("top_k", lambda x: lax.top_k(x, 2), (x,))
    yield Sample("top_k", lambda x: lax.top_k(x, 2, axis=1), (x,))
    yield Sample("top_k", lambda x: lax.top_k(x, 9), (zeros,))
    for name, fn in (("argmax", lax.argmax), ("argmin", lax.argmin)):
        yield Sample(name, lambda x, fn=fn: fn(x, 0, np.int32), (zeros,))
        yield Sample(name, lambda x, fn=fn: fn(x, 0, np.uint8), (zeros[5:],))
    for name, fn in (("cumlogsumexp", lax.cumlogsumexp), ("cummin", lax.cummin)):
        yield Sample(name, lambda x, fn=fn: fn(x, reverse=True), (zeros[5:],))
    yield Sample("approx_top_k", lambda x: lax.approx_max_k(x, 2), (x,))


def _linalg() -> Iterator[Sample | Case]:
    la = lax.linalg
    x = floats(5, 4, 4) + 2 * np.eye(4, dtype=np.float32)
    spd = (x @ x.swapaxes(1, 2)).astype(np.float32)
    for name, fn in {
        "cholesky": lambda x: la.cholesky(x, symmetrize_input=False), "eig": la.eig,
        "eigh": la.eigh, "hessenberg": la.hessenberg, "lu": la.lu, "qr": la.qr, "schur": la.schur,
        "svd": la.svd, "tridiagonal": la.tridiagonal,
    }.items():  # fmt: skip
        yield Sample(name, fn, (spd,))
    yield Sample("geqrf", lambda x: jnp.linalg.qr(x, mode="raw"), (x,))
    yield Sample("householder_product", la.householder_product, (x, floats(5, 4)))
    yield Sample("ormqr", la.ormqr, (x, floats(5, 4), floats(5, 4, 3)))
    yield Sample("cholesky_update", la.cholesky_update, (spd[0], floats(4)))
    for beta in (0.0, 2.0):
        yield Sample(
            "symmetric_product", lambda x, c, b=beta: la.symmetric_product(x, c, beta=b), (x, spd)
        )
    for left in (True, False):
        b = floats(5, 4, 3) if left else floats(5, 3, 4)
        yield Sample(
            "triangular_solve", lambda a, b, s=left: la.triangular_solve(a, b, left_side=s), (x, b)
        )
    band = floats(5, 4, low=0.5)
    yield Sample("tridiagonal_solve", la.tridiagonal_solve, (band, 4 + band, band, floats(5, 4, 3)))
    yield Sample("lu_pivots_to_permutation", lambda p: la.lu_pivots_to_permutation(p, 4),
                 (np.array([[1, 1, 3, 3], [0, 2, 2, 3], [3, 2, 2, 3]], np.int32),))  # fmt: skip
    z = (floats(4, 5, 6) + 0j).astype(np.complex64)
    yield Sample("fft", lambda x: lax.fft(x, "FFT", (6,)), (z,))
    yield Sample("fft", lambda x: lax.fft(x, "IRFFT", (5, 10)), (z,))
