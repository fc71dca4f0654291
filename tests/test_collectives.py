"""Each collective and each local op: simulated = on devices = what numpy says."""

import functools
import itertools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gspmd import collectives, local
from gspmd.collectives import Backend
from gspmd.ir import Op

SIZES = {"x": 2, "y": 4}
GROUPS = [("y",), ("x", "y"), ("y", "x")]
DTYPES = [
    "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "complex64",
    "int32", "int8", "uint8", "uint32", "int4", "uint4", "bool",
]  # fmt: skip
# Every dtype on a group of two axes against mesh order, and one dtype on the other groups.
CASES = [(dtype, ("y", "x")) for dtype in DTYPES] + [("float32", group) for group in GROUPS[:2]]
Shards = np.ndarray  # [x, y, *local shape]


def on_simulated(fn: Callable[..., Any], *args: jax.Array) -> Any:
    inner = jax.vmap(fn, axis_name="y", axis_size=SIZES["y"])
    return jax.jit(jax.vmap(inner, axis_name="x", axis_size=SIZES["x"]))(*args)


def on_devices(fn: Callable[..., Any], *args: jax.Array) -> Any:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("x", "y"))

    def body(*args: jax.Array) -> Any:
        results = fn(*(x[0, 0] for x in args))
        return jax.tree.map(lambda x: x[None, None], results)

    spec = P("x", "y")
    run = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return jax.jit(run)(*args)


# A back end's forms are right everywhere: TPU's, which are GPU's too, run on CPU devices here.
RUNNERS: dict[Backend, Any] = {"simulated": on_simulated, "tpu": on_devices, "cpu": on_devices}


def numbers(dtype: Any, *shape: int, seed: int = 0) -> jax.Array:
    """Small integers, so that every sum is exact in every dtype."""
    drawn = np.random.default_rng(seed).integers(0, 2, (2, 4, *shape))
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jnp.asarray(drawn + 1j * np.roll(drawn, 1), dtype)
    return jnp.asarray(drawn).astype(dtype)


def plain(x: Any) -> np.ndarray:
    """Something numpy computes with, exactly."""
    if local.is_key(x.dtype):
        return np.asarray(jax.random.key_data(x))
    return np.asarray(x.astype(jnp.complex64))


def groups(shards: Shards, axes: tuple[str, ...]) -> list[tuple[list[tuple[int, int]], Any]]:
    """For each group along `axes`: its devices (x, y) in group order, and their shards."""
    found: list[tuple[list[tuple[int, int]], Any]] = []
    rest = [axis for axis in SIZES if axis not in axes]
    for fixed in itertools.product(*(range(SIZES[axis]) for axis in rest)):
        devices: list[tuple[int, int]] = []
        for index in itertools.product(*(range(SIZES[axis]) for axis in axes)):
            at = dict(zip(rest, fixed, strict=True)) | dict(zip(axes, index, strict=True))
            devices.append((at["x"], at["y"]))
        found.append((devices, [shards[d] for d in devices]))
    return found


def expected(shards: Shards, axes: tuple[str, ...], each: Callable[[list[Any], int], Any]) -> Any:
    """`each(shards of the group, my index)` on every device."""
    out: dict[tuple[int, int], Any] = {}
    for devices, members in groups(shards, axes):
        out |= {device: each(members, i) for i, device in enumerate(devices)}
    rows = [np.stack([out[x, y] for y in range(SIZES["y"])]) for x in range(SIZES["x"])]
    return np.stack(rows)


Case = tuple[str, dict[str, Any], Any]  # a collective, its params, and what it should give


def check(x: jax.Array, cases: list[Case], runner: Backend) -> None:
    """Runs all cases in one program, which compiles sooner than one program for each."""
    ops = [Op(name, (), (), params) for name, params, _ in cases]
    run = lambda x: [collectives.lower(op, [x], runner)[0] for op in ops]  # noqa: E731
    for (name, params, want), got in zip(cases, RUNNERS[runner](run, x), strict=True):
        group = int(np.prod([SIZES[a] for a in params.get("axes", params.get("src"))]))
        shape = collectives.result_shape(name, x.shape[2:], group, params)
        assert (got.dtype, got.shape) == (x.dtype, (2, 4, *shape))
        np.testing.assert_array_equal(plain(got), want, f"{name} {params}")


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize(("dtype", "axes"), CASES)
def test_what_moves_data_in_every_dtype(dtype: str, axes: tuple[str, ...], runner: Backend) -> None:
    x = numbers(dtype, 8, 3)
    shards = plain(x)
    n = int(np.prod([SIZES[a] for a in axes]))
    gathered = expected(shards, axes, lambda xs, _: np.concatenate(xs, 1))
    cases: list[Case] = [("all_gather", {"axes": axes, "dim": 1}, gathered)]
    exchanged = expected(
        shards, axes, lambda xs, i: np.concatenate([np.split(x, n, 0)[i] for x in xs], 1)
    )
    cases.append(("all_to_all", {"axes": axes, "split_dim": 0, "concat_dim": 1}, exchanged))
    for dst in itertools.permutations(axes):
        permuted = np.empty_like(shards)
        for (to, _), (_, blocks) in zip(groups(shards, dst), groups(shards, axes), strict=True):
            for device, block in zip(to, blocks, strict=True):
                permuted[device] = block
        cases.append(("collective_permute", {"src": axes, "dst": dst}, permuted))
    check(x, cases, runner)


REDUCE: dict[str, Callable[[Any], Any]] = {
    "sum": lambda xs: np.sum(xs, 0),
    "prod": lambda xs: np.prod(xs, 0),
    "max": lambda xs: np.max(xs, 0),
    "min": lambda xs: np.min(xs, 0),
    "and": lambda xs: functools.reduce(np.bitwise_and, xs),
    "or": lambda xs: functools.reduce(np.bitwise_or, xs),
    "xor": lambda xs: functools.reduce(np.bitwise_xor, xs),
}


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize(("dtype", "axes"), CASES)
def test_reductions_in_every_dtype(dtype: str, axes: tuple[str, ...], runner: Backend) -> None:
    x = numbers(dtype, 8, 3)
    n = int(np.prod([SIZES[a] for a in axes]))
    logical = jnp.issubdtype(dtype, jnp.integer) or dtype == "bool"
    shards = plain(x).real.astype(np.int64) if logical else plain(x)
    cases: list[Case] = []
    for reduction, reduce in REDUCE.items():
        if reduction in ("and", "or", "xor") and not logical:
            continue
        total = expected(shards, axes, lambda xs, _, reduce=reduce: reduce(xs))
        if dtype == "bool":
            total = total.astype(bool)
        elif dtype == "int4":
            total = ((total & 15) ^ 8) - 8  # wraps around
        params = {"axes": axes, "reduction": reduction}
        cases.append(("all_reduce", params, total))
        pieces = expected(total, axes, lambda xs, i: np.split(xs[i], n, 0)[i])
        cases.append(("reduce_scatter", {**params, "dim": 0}, pieces))
    check(x, cases, runner)


@pytest.mark.parametrize("runner", RUNNERS)
def test_an_all_reduce_takes_several_operands_of_several_dtypes(runner: Backend) -> None:
    xs = [numbers("float32", 3), numbers("int32", 2, 2, seed=1), numbers("bool", 5, seed=2)]
    op = Op("all_reduce", (), (), {"axes": ("y", "x"), "reduction": "sum"})
    got = RUNNERS[runner](lambda *xs: collectives.lower(op, xs, runner), *xs)
    for x, y in zip(xs, got, strict=True):
        want = np.broadcast_to(plain(x).sum((0, 1)), x.shape)
        np.testing.assert_array_equal(plain(y), want.astype(bool) if x.dtype == bool else want)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("dtype", ["float32", "int4", "bool"])
def test_gathers_and_scatters_take_several_operands(dtype: str, runner: Backend) -> None:
    axes = ("y", "x")
    xs = [numbers(dtype, 8, 3), numbers(dtype, 2, 16, seed=1), numbers(dtype, 3, 8, 2, seed=2)]
    dims = (0, 1, 1)
    for name in ("all_gather", "reduce_scatter"):
        several = Op(name, (), (), {"axes": axes, "dim": dims})
        alone = [Op(name, (), (), {"axes": axes, "dim": dim}) for dim in dims]

        def both(*xs: jax.Array, several: Op = several, alone: list[Op] = alone) -> Any:
            apart = [collectives.lower(op, [x], runner)[0] for op, x in zip(alone, xs, strict=True)]
            return collectives.lower(several, xs, runner), apart

        for got, want in zip(*RUNNERS[runner](both, *xs), strict=True):
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(plain(got), plain(want))


def hlo(op: Op, backend: Backend, *shapes: tuple[int, ...]) -> str:
    """What XLA makes of `op` on 8 CPU devices, lowered as for `backend`."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), ("x",))
    run = lambda *xs: collectives.lower(op, xs, backend)  # noqa: E731
    run = jax.shard_map(run, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)
    xs = [jax.ShapeDtypeStruct((8 * n, *rest), np.float32) for n, *rest in shapes]
    return jax.jit(run).lower(*xs).compile().as_text() or ""


@pytest.mark.parametrize(
    ("name", "params", "spelled"),
    [
        ("all_gather", {"dim": (0, 1)}, "all-gather"),
        ("reduce_scatter", {"dim": (0, 1)}, "reduce-scatter"),
        ("all_reduce", {"reduction": "sum"}, "all-reduce"),
    ],
)
def test_several_operands_are_one_message_on_cpu(
    name: str, params: dict[str, Any], spelled: str
) -> None:
    op = Op(name, (), (), {"axes": ("x",), **params})
    (message,) = re.findall(rf"= (.*) {spelled}\(", hlo(op, "cpu", (8, 4), (2, 8)))
    assert message.startswith("f32"), "one array, no tuple"


@pytest.mark.parametrize(
    ("name", "backend", "first"),
    [
        ("all_gather", "cpu", True),
        ("reduce_scatter", "cpu", True),
        ("all_gather", "tpu", False),
        ("reduce_scatter", "tpu", True),  # in parts of 128 bytes
        ("all_gather", "gpu", False),
        ("reduce_scatter", "gpu", False),
    ],
)
def test_parts_travel_along_the_dim_that_the_back_end_likes(
    name: str, backend: Backend, first: bool
) -> None:
    op = Op(name, (), (), {"axes": ("x",), "dim": 1})
    text = hlo(op, backend, (4, 256))
    (dim,) = re.findall(rf"{name.replace('_', '-')}\(.*dimensions={{(\d)}}", text)
    assert (dim == "0") is first


@pytest.mark.parametrize(
    ("part", "dim", "dtype", "breaks"),
    [
        ((16, 128), 1, "float32", False),
        ((16, 128), 1, "bfloat16", True),
        ((16, 256), 1, "bfloat16", False),
        ((8, 128), 0, "float32", False),
        ((8, 128), 0, "bfloat16", True),
        ((16, 8, 128), 0, "bfloat16", False),
        ((8, 128, 128), 0, "bfloat16", True),  # the compiler may lay any dim along the rows
    ],
)
def test_what_breaks_the_tiles_of_a_tpu(
    part: tuple[int, ...], dim: int, dtype: str, breaks: bool
) -> None:
    assert collectives.FORMS["tpu"].scatter_first(part, dim, jnp.dtype(dtype)) is breaks


@pytest.mark.parametrize(
    ("shape", "dim", "rows"),
    [((256, 32), 1, True), ((32, 8, 32), 0, True), ((256, 64), 1, False), ((8, 32), 1, False)],
)
def test_parts_thinner_than_a_tile_travel_in_rows(
    shape: tuple[int, ...], dim: int, rows: bool
) -> None:
    """f32 over 8: thinner than 8 rows, if a part is a whole number of tiles."""
    params = {"dim": dim, "reduction": "sum"}
    text = hlo(Op("reduce_scatter", (), (), {"axes": ("x",), **params}), "tpu", shape)
    assert bool(re.search(r"f32\[\d+,128\]\S* reduce-scatter\(", text)) is rows
    x, axes = numbers("float32", *shape), ("x", "y")
    scattered = expected(plain(x), axes, lambda xs, i: np.split(sum(xs), 8, dim)[i])
    check(x, [("reduce_scatter", {"axes": axes, **params}, scattered)], "tpu")


@pytest.mark.parametrize("runner", RUNNERS)
def test_random_keys_travel_as_their_words(runner: Backend) -> None:
    keys = jax.random.split(jax.random.key(7), (2, 4, 8))
    axes = ("x", "y")
    shards = plain(keys)
    gathered = expected(shards, axes, lambda xs, _: np.concatenate(xs, 0))
    exchanged = expected(
        shards, axes, lambda xs, i: np.concatenate([np.split(x, 8, 0)[i] for x in xs])
    )
    cases: list[Case] = [
        ("all_gather", {"axes": axes, "dim": 0}, gathered),
        ("all_to_all", {"axes": axes, "split_dim": 0, "concat_dim": 0}, exchanged),
        ("collective_permute", {"src": axes, "dst": axes}, shards),
    ]
    check(keys, cases, runner)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("shape", [(0, 3), (8, 0)])
def test_a_dim_of_size_zero(shape: tuple[int, int], runner: Backend) -> None:
    x = jnp.zeros((2, 4, *shape))
    ops: list[tuple[str, dict[str, Any]]] = [
        ("all_gather", {"axes": ("x", "y"), "dim": 0}),
        ("reduce_scatter", {"axes": ("x", "y"), "dim": 0, "reduction": "sum"}),
        ("all_reduce", {"axes": ("x", "y"), "reduction": "max"}),
        ("all_to_all", {"axes": ("x", "y"), "split_dim": 0, "concat_dim": 1}),
        ("collective_permute", {"src": ("x", "y"), "dst": ("y", "x")}),
    ]
    result = lambda *op: (2, 4, *collectives.result_shape(op[0], shape, 8, op[1]))  # noqa: E731
    check(x, [(*op, np.zeros(result(*op))) for op in ops], runner)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("reduction", ["max", "min"])
def test_extrema_are_differentiable(reduction: str, runner: Backend) -> None:
    op = Op("all_reduce", (), (), {"axes": ("y",), "reduction": reduction})
    extremum = lambda x: collectives.lower(op, [x], runner)[0]  # noqa: E731
    x = jnp.arange(8.0).reshape(2, 4, 1).at[1].set(3.0)
    tangent = RUNNERS[runner](lambda x: jax.jvp(extremum, (x,), (x + 1,))[1], x)
    best = 3 if reduction == "max" else 0
    want = [best + 1, 4]  # the tangent of the chosen one; where all tie, the mean of all
    np.testing.assert_allclose(np.asarray(tangent)[:, 0, 0], want)


@pytest.mark.parametrize("runner", ["simulated", "cpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e5m2"])
def test_extrema_see_nan_and_infinity(dtype: str, runner: Backend) -> None:
    rows = [[np.nan, 1, -2, 3], [-np.nan, np.inf, 0, -1], [np.inf, 1, -np.inf, 2], [-4, -3, -2, -1]]
    x = jnp.broadcast_to(jnp.asarray(rows, dtype).T, (2, 4, 4))
    ops = [Op("all_reduce", (), (), {"axes": ("y",), "reduction": r}) for r in ("max", "min")]
    got = RUNNERS[runner](lambda x: [collectives.lower(op, [x], runner)[0] for op in ops], x)
    for extremum, want in zip(got, (np.max(rows, 1), np.min(rows, 1)), strict=True):
        assert extremum.dtype == dtype
        np.testing.assert_array_equal(plain(extremum).real, np.broadcast_to(want, (2, 4, 4)))


def test_wire_bytes_are_those_of_the_design() -> None:
    operand = 1000.0
    assert collectives.wire_bytes("all_gather", 4, operand) == 3 / 4 * (4 * operand)
    assert collectives.wire_bytes("reduce_scatter", 4, operand) == 3 / 4 * operand
    assert collectives.wire_bytes("all_reduce", 4, operand) == 2 * 3 / 4 * operand
    assert collectives.wire_bytes("all_to_all", 4, operand) == 3 / 4 * operand
    assert collectives.wire_bytes("collective_permute", 4, operand) == operand
    assert all(collectives.wire_bytes(kind, 1, operand) == 0 for kind in collectives.TABLE)


def test_a_dim_that_does_not_fall_into_pieces_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dim 0 of \(6, 2\) does not fall into 4 equal pieces"):
        collectives.result_shape("reduce_scatter", (6, 2), 4, {"dim": 0})


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("axes", GROUPS, ids="".join)
@pytest.mark.parametrize("size", [16, 11, 3, 0])
def test_shard_then_gather_is_the_padded_whole(
    size: int, axes: tuple[str, ...], runner: Backend
) -> None:
    n = int(np.prod([SIZES[a] for a in axes]))
    block = -(-size // n)
    whole = np.arange(2 * size, dtype=np.float32).reshape(2, size)
    padded = np.pad(whole, ((0, 0), (0, block * n - size)))
    x = jnp.broadcast_to(whole, (2, 4, 2, size))
    got = RUNNERS[runner](lambda x: local.shard(x, axes=axes, dim=1, size=size), x)
    want = expected(
        np.broadcast_to(padded, (2, 4, *padded.shape)), axes,
        lambda xs, i: xs[i][:, i * block : (i + 1) * block],
    )  # fmt: skip
    np.testing.assert_array_equal(np.asarray(got), want)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_masked_does_not_show_in_the_reduction(dtype: str, runner: Backend) -> None:
    logical = jnp.issubdtype(dtype, jnp.integer) or dtype == "bool"
    reductions = [r for r in local.REDUCTIONS if logical or r not in ("and", "or", "xor")]
    x = numbers(dtype, 3, 2)
    params = {"axes": ("y", "x"), "dim": 0, "size": 19}
    masked = RUNNERS[runner](
        lambda x: [local.mask(x, reduction=r, **params) for r in reductions], x
    )
    index = np.arange(8).reshape(4, 2).T  # of each device in the group
    inside = index[:, :, None] * 3 + np.arange(3) < 19
    assert not inside.all()
    for reduction, got in zip(reductions, masked, strict=True):
        assert got.dtype == x.dtype
        values = plain(got)
        np.testing.assert_array_equal(values[inside], plain(x)[inside])
        if logical:
            values = values.real.astype(np.int64)
        rows = [*values[inside], *values[~inside]]
        reduce = REDUCE[reduction]
        np.testing.assert_array_equal(reduce(rows), reduce(values[inside]), reduction)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("dtype", [*DTYPES, "key"])
def test_the_sum_of_what_owners_hold_is_one_copy(dtype: str, runner: Backend) -> None:
    one = jax.random.split(jax.random.key(3), 5) if dtype == "key" else numbers(dtype, 5)[0, 0]
    x = jnp.broadcast_to(one, (2, 4, 5))
    op = Op("all_reduce", (), (), {"axes": ("x", "y"), "reduction": "sum"})

    def alone(x: jax.Array) -> Any:
        return collectives.lower(op, [local.owner(x, axes=("x", "y"))], runner)

    (got,) = RUNNERS[runner](alone, x)
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(plain(got), plain(x))
