"""`shard_map` regions in a planned function run as they are written, on both runners."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType

import gspmd
from gspmd import P, SpecError, TraceError
from tests.agreement import kinds

SIZES = {"x": 2, "y": 4}


def devices(**sizes: int) -> jax.sharding.Mesh:
    sizes = sizes or SIZES
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes))


def array(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def region(
    fn: Callable[..., Any], ins: Any, outs: Any, manual: str = "", **options: Any
) -> Callable[..., Any]:
    """`fn` on the shards along the axes `manual`, by default all."""
    names = set(manual) or set(SIZES)
    return jax.shard_map(
        fn, mesh=devices(), in_specs=ins, out_specs=outs, axis_names=names, **options
    )


def check(fn: Callable[..., Any], *args: Any, in_specs: Any = None, **wants: Any) -> gspmd.Plan:
    """The plan of `fn`, which computes what JAX does: simulated, and on the devices."""
    plan = gspmd.plan(fn, *args, mesh=devices(), in_specs=in_specs)
    with jax.set_mesh(devices()):
        expected = jax.tree.leaves(jax.jit(fn)(*args))
    for found in (plan.simulate(*args), plan.run(*args)):
        for want, got in zip(expected, jax.tree.leaves(found), strict=True):
            assert got.dtype == want.dtype
            np.testing.assert_allclose(
                np.asarray(got), np.asarray(want), rtol=1e-4, atol=1e-5, **wants
            )
    return plan


XY = P("x", "y")

COLLECTIVES: dict[str, tuple[Callable[[jax.Array], Any], Any, str]] = {
    "psum": (lambda a: lax.psum(a, "x"), P(None, "y"), "all_reduce"),
    "psum over both": (lambda a: lax.psum(a, ("x", "y")), P(), "all_reduce"),
    "psum of two": (
        lambda a: lax.psum((a, a.astype(jnp.int32)), "y"),
        (P("x"), P("x")),
        "all_reduce",
    ),
    "pmean": (lambda a: lax.pmean(a, "y"), P("x"), "all_reduce"),
    "pmax": (lambda a: lax.pmax(a, "y"), P("x"), "all_reduce"),
    "pmin": (lambda a: lax.pmin(a, ("y", "x")), P(), "all_reduce"),
    "all_gather": (lambda a: lax.all_gather(a, "y", axis=1, tiled=True), P("x"), "all_gather"),
    "all_gather stacked": (
        lambda a: lax.all_gather(a, "y", axis=1),
        P("x", None, None),
        "all_gather",
    ),
    "all_gather over both": (
        lambda a: lax.all_gather(a, ("y", "x"), axis=0, tiled=True),
        P(),
        "all_gather",
    ),
    "psum_scatter": (
        lambda a: lax.psum_scatter(a, "y", scatter_dimension=0, tiled=True),
        P(("x", "y")),
        "reduce_scatter",
    ),
    "psum_scatter over both": (
        lambda a: lax.psum_scatter(a.reshape(8, 2), ("y", "x"), scatter_dimension=0, tiled=True),
        P(("y", "x")),
        "reduce_scatter",
    ),
    "psum_scatter stacked": (
        lambda a: lax.psum_scatter(a, "y", scatter_dimension=0),
        P(("x", "y")),
        "reduce_scatter",
    ),
    "all_to_all": (
        lambda a: lax.all_to_all(a, "y", split_axis=0, concat_axis=1, tiled=True),
        P(("x", "y")),
        "all_to_all",
    ),
    "all_to_all stacked": (
        lambda a: lax.all_to_all(a[None], "y", split_axis=1, concat_axis=2),
        P(None, "x", "y"),
        "all_to_all",
    ),
    "all_to_all over both": (
        lambda a: lax.all_to_all(
            jnp.tile(a, (2, 1)), ("y", "x"), split_axis=0, concat_axis=0, tiled=True
        ),
        XY,
        "all_to_all",
    ),
    "ppermute": (
        lambda a: lax.ppermute(a, "y", [(i, (i + 1) % 4) for i in range(4)]),
        XY,
        "collective_permute",
    ),
    "ppermute of some": (
        lambda a: lax.ppermute(a, "y", [(0, 2), (3, 1)]),
        XY,
        "collective_permute",
    ),
    "ppermute over both": (
        lambda a: lax.ppermute(a, ("y", "x"), [(i, (i + 3) % 8) for i in range(8)]),
        XY,
        "collective_permute",
    ),
    "axis_index": (lambda a: a * lax.axis_index("y") + lax.axis_index(("y", "x")), XY, ""),
}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_each_collective(name: str) -> None:
    fn, outs, kind = COLLECTIVES[name]
    plan = check(region(fn, XY, outs, check_vma=False), array(8, 16))
    assert set(kinds(plan)) == ({kind} if kind else set())
    assert not plan.findings


def reduced(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product whose contraction is written by hand."""
    return lax.psum(jnp.tanh(a) @ b, "y")


@pytest.mark.parametrize("check_vma", [True, False])
def test_all_axes_manual_forward_and_gradient(check_vma: bool) -> None:
    by_hand = region(reduced, (XY, P("y")), P("x"), check_vma=check_vma)
    a, b = array(8, 16), array(16, 6)
    plan = check(by_hand, a, b)
    assert plan.in_specs == (XY, P("y", None))
    assert kinds(plan) == {"all_reduce": 1}
    (one,) = plan.collectives
    assert (one.axes, one.bytes, one.trips) == (("y",), 4 * 6 * 4, 1)
    assert one.wire_bytes == 2 * 3 / 4 * one.bytes
    assert "test_regions.py:" in one.source
    assert "the program asks for it (manual region at " in one.why

    def loss(a: Any, b: Any) -> Any:
        return (by_hand(a, b) ** 2).sum()

    check(jax.grad(loss, argnums=(0, 1)), a, b)
    check(jax.grad(loss, argnums=(0, 1)), a, b, in_specs=(P("y"), None))


@pytest.mark.parametrize("in_specs", [None, XY, P(("x", "y")), P("y", "x")])
@pytest.mark.parametrize("check_vma", [True, False])
def test_some_axes_manual(check_vma: bool, in_specs: Any) -> None:
    def fn(a: Any, b: Any) -> Any:
        return region(
            lambda a, b: lax.psum(jnp.tanh(a) @ b, "x"),
            (P(None, "x"), P("x")),
            P(),
            manual="x",
            check_vma=check_vma,
        )(a, b)

    a, b = array(8, 16), array(16, 6)
    check(fn, a, b, in_specs=(in_specs, None))
    check(jax.grad(lambda a, b: (fn(a, b) ** 2).sum(), argnums=(0, 1)), a, b, in_specs=in_specs)


def test_the_other_axes_are_used_inside() -> None:
    """The rows are split over y outside, so they are inside, and nothing is gathered."""
    fn = region(
        lambda a, b: lax.psum(jnp.tanh(a) @ b, "x"), (P(None, "x"), P("x")), P(), manual="x"
    )
    plan = check(fn, array(8, 16), array(16, 6), in_specs=(P("y", "x"), P("x")))
    assert kinds(plan) == {"all_reduce": 1}
    assert plan.out_specs == P("y", None)
    (one,) = plan.collectives
    assert one.bytes == 8 // 4 * 6 * 4


def test_one_dim_split_by_hand_and_then_by_the_partitioner() -> None:
    """Outside, a manual axis is the major one of a dim; the rest of the split carries on inside."""
    fn = region(lambda a: jnp.sin(a) + lax.axis_index("x"), P("x"), P("x"), manual="x")
    plan = check(fn, array(16, 3), in_specs=P(("x", "y")))
    assert plan.out_specs == P(("x", "y"), None)
    assert not plan.collectives


def test_a_contraction_over_the_other_axes() -> None:
    fn = region(lambda a, b: lax.psum(a @ b, "x"), (P("x"), P()), P(), manual="x")
    plan = check(fn, array(8, 16), array(16, 6), in_specs=(P("x", "y"), P("y")))
    assert sorted(c.axes for c in plan.collectives) == [("x",), ("y",)]
    assert kinds(plan) == {"all_reduce": 2}


def test_pieces_that_do_not_come_out_even_inside() -> None:
    """Rows of a shard, 6, fall over 4 devices with padding: it must not show."""
    fn = region(
        lambda a: lax.psum(jnp.cumsum(a * gspmd.annotate(a, P("y")), 0), "x"),
        P("x"),
        P(),
        manual="x",
    )
    check(fn, array(12, 3))
    check(fn, array(12, 3), in_specs=P("y"))


def test_control_flow_inside() -> None:
    def ring(a: jax.Array, b: jax.Array) -> jax.Array:
        """A product with the columns of `b`, which go round the ring."""

        def step(b: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
            nearer = lax.ppermute(b, "y", [((j + 1) % 4, j) for j in range(4)])
            return nearer, (lax.axis_index("y") + i) % 4 * jnp.tanh(a @ b)

        return lax.scan(step, b, jnp.arange(4))[1]

    fn = region(ring, (P("x"), P(None, "y")), P(None, "x", "y"))
    plan = check(fn, array(8, 16), array(16, 8))
    assert [(c.kind, c.trips) for c in plan.collectives] == [("collective_permute", 4)]

    def until_small(a: jax.Array) -> jax.Array:
        return lax.while_loop(
            lambda a: lax.pmax(jnp.abs(a).max(), ("x", "y")) > 0.1, lambda a: a / 2, a
        )

    plan = check(region(until_small, XY, XY, check_vma=False), array(8, 16))
    assert [c.trips for c in plan.collectives] == [-1]
    assert [finding.code for finding in plan.findings] == ["unbounded-loop"]


def test_in_a_loop_under_remat_and_beside_other_ops() -> None:
    by_hand = region(reduced, (XY, P("y")), P("x"))

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        @jax.checkpoint
        def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return jnp.cos(by_hand(x, w)) @ w.T, None

        return jnp.sum(lax.scan(layer, x, w)[0] ** 2)

    plan = check(jax.grad(loss), array(3, 16, 8) / 4, array(8, 16), in_specs=(None, P("x")))
    assert 3 in {c.trips for c in plan.collectives}


def test_a_reshape_that_cuts_the_axis_of_a_region() -> None:
    """The plan's mesh has y in two parts; the region's collectives are over both."""

    def fn(a: jax.Array) -> jax.Array:
        b = gspmd.annotate(a, P("y")).reshape(2, 6, 4)
        c = region(lambda a: lax.psum(a, "y") + lax.axis_index("y"), P("y"), P("y"))(a)
        return b.sum(1) + c[:2]

    plan = check(fn, array(12, 4), in_specs=P("y"))
    assert len(plan.mesh.axes) == 3
    assert ("y:0", "y:1") in {c.axes for c in plan.collectives}


def test_a_manual_axis_of_size_one() -> None:
    mesh = devices(x=1, y=4)
    fn = jax.shard_map(
        lambda a: lax.psum(a * (1 + lax.axis_index("x")), ("x", "y")) + lax.psum(a, "y"),
        mesh=mesh,
        in_specs=P("x", "y"),
        out_specs=P("x"),
    )
    a = array(4, 8)
    plan = gspmd.plan(fn, a, mesh=mesh)
    expected = np.asarray(jax.jit(fn)(a))
    np.testing.assert_allclose(plan.simulate(a), expected, rtol=1e-5)
    np.testing.assert_allclose(plan.run(a), expected, rtol=1e-5)


def test_keys_and_constants_inside() -> None:
    table = array(3)

    def noisy(key: jax.Array, a: jax.Array) -> jax.Array:
        mine = jax.random.fold_in(key, lax.axis_index(("x", "y")))
        return a + jax.random.normal(mine, a.shape) * table[0]

    check(region(noisy, (P(), XY), XY), jax.random.key(3), array(8, 16))


@pytest.mark.parametrize("in_specs", [None, P(("x", "y"), "z"), P("z", "y")])
def test_a_region_in_a_region(in_specs: Any) -> None:
    mesh = devices(x=2, y=2, z=2)

    def fn(a: jax.Array) -> jax.Array:
        def outer(a: jax.Array) -> jax.Array:
            def inner(a: jax.Array) -> jax.Array:
                return lax.psum(a, "y") + lax.axis_index("x")

            split = jax.shard_map(inner, in_specs=P("y"), out_specs=P(), axis_names={"y"})
            return lax.psum(split(jnp.sin(a)), "x")

        return jax.shard_map(outer, mesh=mesh, in_specs=P("x"), out_specs=P(), axis_names={"x"})(a)

    a = array(8, 16)
    for each in (fn, jax.grad(lambda a: (fn(a) ** 2).sum())):
        plan = gspmd.plan(each, a, mesh=mesh, in_specs=in_specs)
        expected = np.asarray(jax.jit(each)(a))
        np.testing.assert_allclose(plan.simulate(a), expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(plan.run(a), expected, rtol=1e-4, atol=1e-5)


def test_a_partitioned_function_inside() -> None:
    inner = gspmd.partition(lambda a, b: jnp.tanh(a @ b), mesh=devices(), in_specs=(XY, P("y")))
    plan = check(lambda a, b: inner(a, b) * 2, array(8, 16), array(16, 6))
    assert kinds(plan) == {"all_reduce": 1}


@pytest.mark.parametrize("sizes", [{"x": 4, "y": 2}, {"z": 8}, {"x": 2}])
def test_another_mesh_is_refused(sizes: dict[str, int]) -> None:
    axis = next(iter(sizes))
    fn = jax.shard_map(lambda a: a, mesh=devices(**sizes), in_specs=P(axis), out_specs=P(axis))
    written = ", ".join(f"{name}={size}" for name, size in sizes.items())
    message = (
        rf"^the shard_map at \S+test_regions.py:\d+ is written for the mesh {written}, and the "
        r"plan is for x=2, y=4; give both .*\.$"
    )
    with pytest.raises(TraceError, match=message):
        gspmd.plan(lambda a: fn(a), array(8, 16), mesh="x=2,y=4")


def test_an_annotation_over_a_manual_axis_is_refused() -> None:
    fn = region(lambda a: gspmd.annotate(a, P("x")), P("x"), P("x"), manual="x")
    with pytest.raises(SpecError, match=r"axis 'x' is manual in the shard_map around it"):
        gspmd.plan(fn, array(8, 16), mesh="x=2,y=4")


def test_groups_of_devices_are_refused() -> None:
    fn = region(
        lambda a: lax.all_gather(a, "y", axis_index_groups=[[0, 1], [2, 3]]),
        XY,
        P(None, "x", "y"),
        check_vma=False,
    )
    with pytest.raises(TraceError, match=r"all_gather at .* is over groups of devices"):
        gspmd.plan(fn, array(8, 16), mesh="x=2,y=4")


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([(0, 1), (2, 1)], r"of the pair \(2, 1\) the destination 1 is there twice, over .*y"),
        ([(0, 1), (0, 2)], r"of the pair \(0, 2\) the source 0 is there twice"),
        (
            [(0, 7)],
            r"of the pair \(0, 7\) the destination 7 is no device there, over .* of 4 ",
        ),
        ([(-1, 0)], r"of the pair \(-1, 0\) the source -1 is no device there"),
    ],
)
def test_a_permutation_that_is_none_is_refused(pairs: Any, message: str) -> None:
    fn = region(lambda a: lax.ppermute(a, "y", pairs), XY, XY, check_vma=False)
    with pytest.raises(TraceError, match=rf"^ppermute at \S+test_regions.py:\d+: {message}"):
        gspmd.plan(fn, array(8, 16), mesh="x=2,y=4")


@pytest.mark.parametrize("axes", ["y", ("y", "x"), ("x", "y")])
def test_an_exchange_of_what_all_devices_have_alike(axes: Any) -> None:
    """What is not split over an axis may still be exchanged along it."""
    fn = region(
        lambda a: lax.all_to_all(a, axes, split_axis=0, concat_axis=1, tiled=True),
        P(None, None),
        P(("x", "y")),
        check_vma=False,
    )
    check(fn, array(8, 3))
