"""Laws of resharding: right values, no more wire bytes than gather-then-slice, no more memory than
the larger of source and target, and no more bytes than needed where nothing is owed."""

import functools
import importlib.util
import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gspmd
from gspmd import P, run
from gspmd.collectives import wire_bytes
from gspmd.reshard import reshard_steps
from gspmd.reshard.moves import lower
from gspmd.sharding import Axes, Mesh, Sharding

MESHES = {
    "2x2": Mesh((("x", 2), ("y", 2))),
    "4x2": Mesh((("x", 4), ("y", 2))),
    "2x2x2": Mesh((("x", 2), ("y", 2), ("z", 2))),
}
# Padded blocks, and blocks over (x, y) that straddle those over x.
EVEN, UNEVEN, STRADDLING = (16, 8), (7, 5), (6, 10)
SHAPES = pytest.mark.parametrize("shape", [EVEN, UNEVEN, STRADDLING], ids=str)
F32 = np.dtype(np.float32)


def exhaustive(shape: tuple[int, ...]) -> Any:
    return pytest.param(shape, marks=pytest.mark.exhaustive)


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    folder = str(Path(__file__).parent.parent / "benchmarks")
    spec = importlib.util.spec_from_file_location("resharding", f"{folder}/resharding.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setitem(sys.modules, "resharding", module)
        spec.loader.exec_module(module)
    return module


def shardings(mesh: Mesh) -> list[Sharding]:
    """Every sharding of a matrix on `mesh`, nothing owed."""
    found: dict[Sharding, None] = {}
    for count in range(len(mesh.names) + 1):
        for axes in itertools.permutations(mesh.names, count):
            for cut in range(count + 1):
                found[Sharding((axes[:cut], axes[cut:]))] = None
    return list(found)


def pairs(mesh: Mesh) -> Iterator[tuple[Sharding, Sharding]]:
    """Every source, owing a sum over each set of the axes left, with every target."""
    for src, dst in itertools.product(shardings(mesh), repeat=2):
        rest = [axis for axis in mesh.names if axis not in src.axes]
        for count in range(len(rest) + 1):
            for partial in itertools.combinations(rest, count):
                yield Sharding(src.dims, partial), dst


def local_bytes(shape: tuple[int, ...], mesh: Mesh, sharding: Sharding) -> int:
    return math.prod(sharding.local_shape(shape, mesh)) * F32.itemsize


def gather_then_slice(shape: tuple[int, ...], mesh: Mesh, src: Sharding) -> float:
    """Wire bytes of paying every sum where it is owed and then gathering every dim."""
    size = local_bytes(shape, mesh, src)
    total = wire_bytes("all_reduce", mesh.size(src.partial), size) if src.partial else 0.0
    for dim, axes in enumerate(src.dims):
        total += wire_bytes("all_gather", mesh.size(axes), local_bytes(shape, mesh, src))
        src = src.with_dim(dim, ())
    return total


@SHAPES
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_bytes_and_memory_are_bounded(mesh: Mesh, shape: tuple[int, ...]) -> None:
    for src, dst in pairs(mesh):
        plan = reshard_steps(shape, F32, mesh, src, dst)
        states = [src, *(step.dst for step in plan.steps)]
        assert states[-1] == dst
        assert [step.src for step in plan.steps] == states[:-1]
        assert plan.wire_bytes == sum(step.wire_bytes for step in plan.steps)
        most = max(local_bytes(shape, mesh, state) for state in states)
        assert plan.peak_bytes == most == max(local_bytes(shape, mesh, s) for s in (src, dst))
        whole = gather_then_slice(shape, mesh, src)
        assert plan.wire_bytes <= whole * (1 + 1e-9), f"{src} -> {dst}\n{plan}"
        between = states[1:-1]
        assert not dst.axes or not any(state == Sharding(((), ())) for state in between)


@SHAPES
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_a_step_sends_what_it_says(mesh: Mesh, shape: tuple[int, ...]) -> None:
    """The ops of a step, one after the other, give its target and send the bytes that it costs."""
    steps = {
        step: None
        for src, dst in pairs(mesh)
        for step in reshard_steps(shape, F32, mesh, src, dst).steps
    }
    for step in steps:
        ops = lower(step, shape, mesh)
        shapes = [step.src.local_shape(shape, mesh), *(op.shape for op in ops)]
        collectives = [op for op in ops if op.call is None]
        sent = 0.0
        for op in collectives:
            (operand,) = op.ins
            group = mesh.size(op.params.get("axes") or op.params["src"])
            sent += wire_bytes(op.name, group, math.prod(shapes[operand]) * F32.itemsize)
        assert sent == pytest.approx(step.wire_bytes), str(step)
        assert len(collectives) == step.collectives
        assert shapes[-1] == step.dst.local_shape(shape, mesh)


@pytest.mark.parametrize(("name", "rank"), [("2x2", 3), ("4x2", 2), ("4x4", 2), ("2x2x2", 2)])
def test_the_lower_bound_is_met(bench: ModuleType, name: str, rank: int) -> None:
    """Everywhere if nothing is owed; else within a third on the average of those that miss it."""
    mesh, shape = bench.MESHES[name], bench.SHAPES[rank]
    ratios: list[float] = []
    for pair in bench.pairs(mesh, rank)[:: 1 if len(mesh.axes) == 2 else 7]:
        sent = reshard_steps(shape, F32, mesh, *pair).wire_bytes
        bound = bench.lower_bound(shape, F32.itemsize, mesh, pair)
        assert sent >= bound * (1 - 1e-9), pair
        if pair.owed:
            ratios.append(sent / bound if bound else 1.0)
        else:
            assert sent == pytest.approx(bound), pair
    assert math.exp(np.mean(np.log(ratios))) < 1.1
    assert max(ratios) <= 1.5 + 1e-9


@SHAPES
def test_the_rest_of_a_way_is_a_way(shape: tuple[int, ...]) -> None:
    mesh = MESHES["2x2"]
    for src, dst in pairs(mesh):
        plan = reshard_steps(shape, F32, mesh, src, dst)
        left = plan.wire_bytes
        for step in plan.steps:
            left -= step.wire_bytes
            rest = reshard_steps(shape, F32, mesh, step.dst, dst)
            assert rest.wire_bytes <= left + 1e-6, f"{src} -> {dst}\n{plan}"
        assert reshard_steps(shape, F32, mesh, dst, dst).steps == ()


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_a_finer_split_of_what_is_at_hand_moves_nothing(mesh: Mesh) -> None:
    for src, dst in pairs(mesh):
        if src.partial:
            continue
        finer = all(b[: len(a)] == a for a, b in zip(src.dims, dst.dims, strict=True))
        steps = reshard_steps(EVEN, F32, mesh, src, dst).steps
        assert finer == all(step.kind == "slice" for step in steps)


def spec(dims: tuple[Axes, ...]) -> P:
    return P(*dims)


@functools.cache
def some_pairs(name: str, count: int) -> list[tuple[Sharding, Sharding]]:
    """All pairs, or as many of them, spread evenly."""
    found = list(pairs(MESHES[name]))
    step = max(1, len(found) // count) | 1  # odd, so as not to keep in step with the targets
    return found[::step]


@pytest.mark.parametrize("shape", [EVEN, UNEVEN, exhaustive(STRADDLING)], ids=str)
@pytest.mark.parametrize("name", MESHES)
def test_values_arrive(name: str, shape: tuple[int, ...]) -> None:
    """One program reshards one matrix, or a sum that is still owed, in many ways."""
    mesh = MESHES[name]
    cases = some_pairs(name, 25)
    x = np.random.default_rng(0).integers(-9, 9, (mesh.devices, *shape)).astype(np.float32)
    sources = list(dict.fromkeys(src for src, _ in cases))

    def reshards(*stacks: jnp.ndarray) -> list[jnp.ndarray]:
        owed = {src: jnp.sum(stack, axis=0) for src, stack in zip(sources, stacks, strict=True)}
        return [gspmd.annotate(owed[src], spec(dst.dims)) for src, dst in cases]

    in_specs = tuple(P(src.partial or None, *src.dims) for src in sources)
    plan = gspmd.plan(reshards, *[x] * len(sources), mesh=dict(mesh.axes), in_specs=in_specs)
    found = run.replicas(plan.program, plan.mesh, [x] * len(sources), poison=True)
    for (src, dst), copies in zip(cases, found, strict=True):
        want = np.broadcast_to(x.sum(axis=0), copies.shape)
        np.testing.assert_array_equal(copies, want, err_msg=f"{src} -> {dst}")


def test_values_arrive_on_devices() -> None:
    """Random keys too, whose words no collective may tear apart."""
    x = np.arange(60, dtype=np.float32).reshape(6, 10)
    keys = jax.random.split(jax.random.key(0), x.shape)
    cases = some_pairs("2x2x2", 300)
    cases = [(src, dst) for src, dst in cases if not src.partial][:40]

    def reshards(x: jax.Array, keys: jax.Array) -> list[jax.Array]:
        ways: list[jax.Array] = []
        for src, dst in cases:
            ways += [
                gspmd.annotate(gspmd.annotate(y, spec(src.dims)), spec(dst.dims)) for y in (x, keys)
            ]
        return ways

    found = gspmd.partition(reshards, "x=2,y=2,z=2")(x, keys)
    for (src, dst), numbers, words in zip(cases, found[::2], found[1::2], strict=True):
        at = f"{src} -> {dst}"
        np.testing.assert_array_equal(np.asarray(numbers), x, err_msg=at)
        both = (jax.random.key_data(jnp.asarray(k)) for k in (words, keys))
        np.testing.assert_array_equal(*both, err_msg=at)


def parse(text: str) -> Sharding:
    """`x,yz+w`: a dim over x, one over (y, z), and a sum over w."""
    dims, _, owed = text.partition("+")
    return Sharding(tuple(map(tuple, dims.split(","))), tuple(owed))


# On a mesh of 4 x 2 x 2: the steps, and the bytes that a device sends, in parts of 1/1024.
GOLDENS: dict[str, tuple[str, str, list[str], float]] = {
    "slice": ("x,", "x,y", ["slice"], 0),
    "gather one dim": ("x,y", "x,", ["all_gather"], 128),
    "gather two dims": ("x,y", ",", ["all_gather", "all_gather"], 1024 - 128),
    "move an axis": ("x,", ",x", ["all_to_all"], 192),
    "move two axes": ("xy,", ",yx", ["all_to_all"], 128 * 7 / 8),
    "move two axes from two dims": ("x,y,", ",,xy", ["all_to_all"], 128 * 7 / 8),
    "slice, then move": ("x,", ",xy", ["slice+all_to_all"], 96),
    "move one, gather one": ("xy,", ",y", ["all_to_all", "all_gather"], 512 - 64),
    "move the major axis": ("yx,", ",y", ["all_to_all+all_gather"], 512 - 64),
    "swap two axes": ("y,z", "z,y", ["collective_permute"], 256),
    "another axis": ("y,", "z,", ["collective_permute"], 512),
    "another order": ("yz,", "zy,", ["collective_permute"], 256),
    "a larger axis": ("x,", "y,", ["collective_permute", "all_gather"], 512),
    "axes change dims and order": ("yz,", "z,y", ["collective_permute"], 256),
    "pay where it is wanted": ("xz,+y", "xzy,", ["reduce_scatter"], 64),
    "pay in another order": ("z,+xy", "zyx,", ["reduce_scatter"], 512 * 7 / 8),
    "pay in two dims": ("z,+xy", "zx,y", ["reduce_scatter"], 512 * 7 / 8),
    "slice, then pay": ("z,+x", "zxy,", ["slice+reduce_scatter"], 192),
    "pay on slices, then gather": ("z,+x", "zx,", ["slice", "reduce_scatter", "all_gather"], 256),
    "pay and move": ("zy,+x", "z,yx", ["reduce_scatter+all_to_all"], 192 + 32),
}


@pytest.mark.parametrize("case", GOLDENS.values(), ids=GOLDENS)
def test_steps(case: tuple[str, str, list[str], float]) -> None:
    src, dst, kinds, sent = case
    mesh = Mesh((("x", 4), ("y", 2), ("z", 2)))
    a, b = parse(src), parse(dst)
    plan = reshard_steps((32,) * len(a.dims), np.dtype(np.int8), mesh, a, b)
    assert [step.kind for step in plan.steps] == kinds
    assert plan.wire_bytes * 1024 / 32 ** len(a.dims) == sent


def test_a_sum_is_paid_by_the_cheapest_reduction() -> None:
    mesh = MESHES["2x2"]
    owed = Sharding(((), ()), ("x",))
    whole = reshard_steps(EVEN, F32, mesh, owed, Sharding(((), ())))
    split = reshard_steps(EVEN, F32, mesh, owed, Sharding((("x",), ())))
    assert [step.kind for step in whole.steps] == ["all_reduce"]
    assert [step.kind for step in split.steps] == ["reduce_scatter"]
    assert split.wire_bytes == whole.wire_bytes / 2 == 16 * 8 * 4 / 2


def test_a_sum_is_paid_on_slices_along_a_spare_axis() -> None:
    """2 * 3/4 of 256 bytes and 256 to gather, in place of 2 * 3/4 of 512."""
    owed = Sharding(((), ()), ("x",))
    plan = reshard_steps(EVEN, F32, MESHES["4x2"], owed, Sharding(((), ())))
    assert [step.kind for step in plan.steps] == ["slice", "all_reduce", "all_gather"]
    assert plan.wire_bytes == 2 * 3 / 4 * 256 + 256


def test_a_scalar_has_nothing_to_slice() -> None:
    plan = reshard_steps((), F32, MESHES["4x2"], Sharding((), ("x",)), Sharding(()))
    assert [step.kind for step in plan.steps] == ["all_reduce"]


def test_an_empty_tensor_is_resharded() -> None:
    for src, dst in pairs(MESHES["2x2"]):
        plan = reshard_steps((0, 8), F32, MESHES["2x2"], src, dst)
        assert plan.wire_bytes == plan.peak_bytes == 0


@pytest.mark.parametrize("shape", [(0, 8), (0, 0)])
def test_shards_of_an_empty_tensor_are_cut_and_joined(shape: tuple[int, int]) -> None:
    """Onto both axes in one dim, and back: of no entries no size can be inferred."""
    empty = np.zeros(shape, np.float32)
    for src, dst in itertools.permutations([P(None, "x"), P(("x", "y"))]):
        plan = gspmd.plan(lambda x: x, empty, mesh="x=4,y=3", in_specs=src, out_specs=dst)
        assert plan.simulate(empty).shape == shape


def test_many_partners_are_not_served_one_by_one() -> None:
    """64 devices hold what one wants: an all_to_all after one permute, at twice the bytes."""
    mesh = Mesh((("x", 16), ("y", 64)))
    few, many = Sharding((("x", "y"), ())), Sharding((("y", "x"), ()))
    goal = (Sharding((("y",), ("x",))), Sharding((("x",), ("y",))))
    kinds = [
        [
            move.kind
            for step in reshard_steps((2048, 2048), F32, mesh, src, dst).steps
            for move in step.moves
        ]
        for src, dst in zip((few, many), goal, strict=True)
    ]
    assert kinds == [["collective_permute"] * 16, ["collective_permute", "all_to_all"]]


def test_a_maximum_is_scattered_too() -> None:
    """JAX has no such reduce_scatter, `collectives` makes one of the same bytes."""
    x = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)

    def largest(x: jax.Array) -> jax.Array:
        return gspmd.annotate(jnp.max(x, axis=0), P("x"))

    plan = gspmd.plan(largest, x, mesh="x=4", in_specs=(P("x"),))
    assert [c.kind for c in plan.collectives] == ["reduce_scatter"]
    (found,) = run.replicas(plan.program, plan.mesh, [x], poison=True)
    np.testing.assert_array_equal(found[0], x.max(axis=0))


def test_a_plan_reads_well() -> None:
    mesh = MESHES["2x2"]
    plan = reshard_steps(EVEN, F32, mesh, Sharding((("x",), ())), Sharding(((), ("x",))))
    assert str(plan) == (
        "all_to_all         x        f32[16,8@x]  128 B\nwire bytes 128, peak bytes 256"
    )


@pytest.mark.parametrize(
    ("shape", "dtype", "src", "dst", "says"),
    [
        ((8,), "flot32", P("x"), P(), "'flot32' is no dtype"),
        (8, "float32", P("x"), P(), "8 is no shape"),
        ((-8,), "float32", P("x"), P(), r"\(-8,\) is no shape"),
        ((8,), "float32", None, P(), "src is None"),
        ((8,), "float32", P("y"), P(), "src: dim 0 of P\\('y'\\) names 'y'"),
        (
            (8,),
            "float32",
            P(),
            P(unreduced=frozenset({"x"})),
            "dst owes a sum over x, src over nothing",
        ),
        ((8,), "float32", P(unreduced=frozenset({"z"})), P(), r"owes a sum over \['z'\]"),
    ],
)
def test_reshard_plan_refuses(shape: Any, dtype: Any, src: Any, dst: Any, says: str) -> None:
    with pytest.raises(gspmd.SpecError, match=says):
        gspmd.reshard_plan(shape, dtype, "x=2", src, dst)


def test_memory_is_limited() -> None:
    pair = P("x", None), P(None, "x")
    plan = gspmd.reshard_plan((8, 16), "float32", "x=4", *pair, memory_limit=128)
    assert plan == gspmd.reshard_plan((8, 16), "float32", "x=4", *pair)
    with pytest.raises(
        gspmd.SpecError,
        match=r"f32\[8@x,16\] -> f32\[8,16\]: dst takes 512 bytes on a device, "
        "memory_limit is 500; split dst over more axes, or raise memory_limit",
    ):
        gspmd.reshard_plan((8, 16), "float32", "x=4", P("x"), P(), memory_limit=500)
