"""What a fusion costs: FLOPs, traffic and the roofline, against numbers worked out by hand."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import gspmd
from gspmd.cost import cost, flops_of, product_seconds, products, reached, traffic
from gspmd.fusion import fuse
from gspmd.ir import Program, trip_count
from gspmd.meshes import chip
from gspmd.rules.factor import Product

V5E = chip("tpu-v5e")


def local(fn: Any, *args: Any) -> Program:
    return gspmd.plan(fn, *args, mesh={"x": 1}).program


def flops(fn: Any, *args: Any) -> float:
    return flops_of(products(local(fn, *args), trip_count))


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_flops_of_a_batched_product() -> None:
    assert flops(lambda x, w: jnp.einsum("bik,bkj->bij", x, w), f32(3, 4, 5), f32(3, 5, 6)) == (
        2 * 3 * 4 * 5 * 6
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window_strides": (2, 2)},
        {"padding": ((1, 1), (1, 1))},
        {"rhs_dilation": (2, 2)},
        {"feature_group_count": 2},
        {"batch_group_count": 2},
    ],
    ids=str,
)
def test_flops_of_a_convolution_are_those_that_xla_counts(options: dict[str, Any]) -> None:
    groups = options.get("feature_group_count", 1)
    options = {"window_strides": (1, 1), "padding": "VALID"} | options
    x, w = f32(4, 8, 16, 16), f32(12, 8 // groups, 3, 3)
    fn = lambda x, w: lax.conv_general_dilated(x, w, **options)  # noqa: E731
    counted = jax.jit(fn).lower(x, w).compile().cost_analysis()
    assert counted is not None
    if options.get("padding") == "VALID":
        assert flops(fn, x, w) == counted["flops"]
    else:  # XLA leaves out the multiplications with padding
        assert counted["flops"] < flops(fn, x, w) < 1.25 * counted["flops"]


def test_a_loops_flops_count_as_often_as_it_runs() -> None:
    fn = lambda x: lax.scan(lambda c, _: (c @ c, None), x, None, length=7)[0]  # noqa: E731
    assert flops(fn, f32(4, 4)) == 7 * 2 * 4**3


@pytest.mark.parametrize("mesh", [{"x": 2}, {"x": 2, "y": 2}, {"x": 3}])
def test_devices_do_at_least_the_work_of_one(mesh: dict[str, int]) -> None:
    """With equality where nothing is repeated or padded."""

    def mlp(x: Any, up: Any, down: Any) -> Any:
        return jnp.tanh(x @ up) @ down

    last = list(mesh)[-1]
    specs = (gspmd.P("x"), gspmd.P(None, last if last != "x" else None), None)
    args = (f32(8, 16), f32(16, 32), f32(32, 16))
    plan = gspmd.plan(mlp, *args, mesh=mesh, in_specs=specs)
    whole = sum(product.flops for _, product, _ in products(plan.model, trip_count))
    pieces = sum(product.flops for _, product, _ in products(plan.program, trip_count))
    devices = plan.mesh.devices
    assert pieces * devices >= whole
    assert (pieces * devices == whole) == (mesh != {"x": 3})


def test_traffic_is_what_is_read_and_what_is_stored() -> None:
    (fusion,) = fuse(local(lambda x, w: jnp.tanh(x @ w), f32(8, 4), f32(4, 16)))
    assert traffic(fusion) == 4 * (8 * 4 + 4 * 16 + 8 * 16)


def test_a_gather_reads_what_it_returns() -> None:
    fusions = fuse(local(lambda w, i: w[i], f32(1000, 16), jax.ShapeDtypeStruct((5,), jnp.int32)))
    (picked,) = (f for f in fusions if f.root.name == "gather")
    assert traffic(picked) < 4 * 1000 * 16 / 10


def test_an_update_in_place_touches_what_it_changes() -> None:
    fn = lambda x, y: lax.dynamic_update_slice(x, y, (3, 0))  # noqa: E731
    (fusion,) = fuse(local(fn, f32(1000, 16), f32(2, 16)))
    assert traffic(fusion) == 2 * 4 * 2 * 16


def test_a_large_product_waits_for_arithmetic_and_a_sum_for_memory() -> None:
    big = f32(4096, 4096)
    (product,) = fuse(local(lambda x, w: x @ w, big, big))
    (total,) = fuse(local(lambda x, y: x + y, big, big))
    (small,) = fuse(local(lambda x: x + 1, f32(2)))
    assert [cost(f, V5E).bound for f in (product, total, small)] == ["compute", "memory", "launch"]
    assert cost(total, V5E).seconds == 3 * 4 * 4096**2 / (
        V5E.device_bandwidth * V5E.memory_efficiency
    )


def test_a_product_is_padded_to_the_matrix_unit() -> None:
    """Two dims fill the unit, in sides of 128; one may stream past, in rows of 8."""

    def seconds(m: int, n: int, k: int) -> float:
        return product_seconds(Product(1, m, n, k), np.dtype("bfloat16"), V5E)

    assert seconds(1, 1024, 1024) == seconds(8, 1024, 1024)
    assert seconds(1024, 100, 1024) == seconds(1024, 104, 1024) < seconds(1024, 105, 1024)
    assert seconds(1024, 100, 100) == seconds(1024, 104, 128)


def test_the_share_of_the_peak_is_read_off_the_measurements() -> None:
    for side, share in V5E.efficiency:
        assert reached(V5E, side) == pytest.approx(share)
    sides = np.geomspace(V5E.efficiency[0][0] / 4, V5E.efficiency[-1][0] * 4, 50)
    shares = [reached(V5E, side) for side in sides]
    assert shares == sorted(shares)
    assert shares[-1] == V5E.efficiency[-1][1]


def test_a_chip_without_a_peak_for_the_dtype_says_so() -> None:
    x = jax.ShapeDtypeStruct((8, 8), jnp.bfloat16)
    (fusion,) = fuse(local(lambda x: x @ x, x))
    with pytest.raises(gspmd.MeshError, match=r"v100 has no published peak for bfloat16: it has"):
        cost(fusion, chip("v100"))


def test_it_is_the_same_for_equal_fusions() -> None:
    (fusion,) = fuse(local(lambda x: x @ x, f32(8, 8)))
    assert cost(fusion, V5E) == cost(dataclasses.replace(fusion), V5E)
