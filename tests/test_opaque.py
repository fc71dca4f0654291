"""Kernels, callbacks and foreign calls: run whole on every device, unless a rule says better."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback
from jax.experimental import pallas as pl
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

import gspmd
from gspmd import P
from tests.agreement import agrees, kinds

MESH = "x=2,y=4"
_NUMBERS = itertools.count()


def array(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


pytestmark = pytest.mark.usefixtures("rule_table")


def doubling(x: jax.Array) -> jax.Array:
    """A kernel over blocks of four rows."""

    def kernel(x: Any, out: Any) -> None:
        out[...] = jax.lax.fori_loop(0, 3, lambda i, y: y + jnp.where(i < 1, x[...], 0), x[...])

    block = pl.BlockSpec((4, x.shape[1]), lambda i: (i, 0))
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(x.shape[0] // 4,),
        in_specs=[block],
        out_specs=block,
        interpret=True,
    )(x)


def sine(x: jax.Array) -> jax.Array:
    return jax.pure_callback(
        lambda a: np.sin(a), jax.ShapeDtypeStruct(x.shape, x.dtype), x, vmap_method="sequential"
    )


def foreign(x: jax.Array) -> Any:
    """A call of something that this process does not have."""
    return jax.ffi.ffi_call("tests_foreign", jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


OPAQUE: dict[str, tuple[Callable[..., Any], Any]] = {
    "pallas_call": (doubling, array(8, 8)),
    "pure_callback": (sine, array(8, 8)),
    "ffi_call": (foreign, array(8, 8)),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_what_nobody_knows_runs_whole_with_a_finding(name: str) -> None:
    fn, x = OPAQUE[name]
    plan = gspmd.plan(fn, x, mesh=MESH, in_specs=P("x"))
    assert kinds(plan) == {"all_gather": 1}
    (finding,) = plan.findings
    assert (finding.code, finding.bytes) == ("no-rule", 4 * 8 * 4)
    assert finding.source is not None
    assert finding.message == (
        f"{name} at {finding.source} has no factor rule, so it runs whole on every device: "
        "128 bytes per device gathered"
    )
    if fn is not foreign:
        expected = np.asarray(jax.jit(fn)(x))
        np.testing.assert_allclose(plan.simulate(x), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(plan.run(x), expected, rtol=1e-5, atol=1e-6)


def test_an_interpreted_kernel_beside_an_annotation() -> None:
    """Traced where there is no mesh, for the kernel's sake, no annotation is lost."""

    mesh = jax.make_mesh((2, 4), ("x", "y"), (jax.sharding.AxisType.Auto,) * 2)
    rows = jax.sharding.NamedSharding(mesh, P("x"))

    def fn(x: jax.Array) -> jax.Array:
        return doubling(jax.lax.with_sharding_constraint(x, rows))

    x = array(8, 8)
    plan = gspmd.plan(fn, x, mesh=MESH)
    assert plan.in_specs == (P("x", None),)
    agrees(plan, fn, x)


def test_a_kernel_in_a_region_is_as_it_is_written() -> None:
    mesh = jax.make_mesh((2, 4), ("x", "y"), (jax.sharding.AxisType.Auto,) * 2)
    fn = jax.shard_map(
        doubling, mesh=mesh, in_specs=P("x", "y"), out_specs=P("x", "y"), check_vma=False
    )
    x = array(8, 8)
    plan = gspmd.plan(fn, x, mesh=mesh)
    assert not plan.collectives
    assert [finding.bytes for finding in plan.findings] == [0]
    np.testing.assert_allclose(plan.simulate(x), 2 * x, rtol=1e-6)
    np.testing.assert_allclose(plan.run(x), 2 * x, rtol=1e-6)


def own(fn: Callable[..., Any]) -> Primitive:
    """A primitive that computes `fn`, whatever the shape."""
    made = Primitive(f"own_{next(_NUMBERS)}")
    made.def_abstract_eval(lambda x: jax.core.ShapedArray(x.shape, x.dtype))
    mlir.register_lowering(made, mlir.lower_fun(fn, multiple_results=False))
    batching.primitive_batchers[made] = lambda xs, dims: (jax.vmap(fn, dims)(*xs), 0)
    return made


def test_a_kernel_with_a_rule_is_split() -> None:
    primitive = own(doubling)
    # Blocks of four rows: drawn operands of six rows do not have them, so an example is given.
    gspmd.register_rule(primitive, "_ j -> _ j", example=(array(8, 6),))
    x = array(8, 8)
    plan = gspmd.plan(lambda x: primitive.bind(x), x, mesh=MESH, in_specs=P(None, "y"))
    assert not plan.collectives
    assert not plan.findings
    np.testing.assert_allclose(plan.simulate(x), 2 * x, rtol=1e-6)


def test_a_callback_with_a_rule_is_split() -> None:
    primitive = own(sine)
    gspmd.register_rule(primitive, "i j -> i j")
    x = array(7, 6)
    plan = gspmd.plan(lambda x: primitive.bind(x), x, mesh=MESH, in_specs=P("x", "y"))
    assert not plan.collectives
    assert not plan.findings
    np.testing.assert_allclose(plan.simulate(x), np.sin(x), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(plan.run(x)), np.sin(x), rtol=1e-5)


def test_side_effects_are_kept_and_told() -> None:
    seen: list[float] = []

    def told(x: jax.Array) -> jax.Array:
        io_callback(lambda total: seen.append(float(total)), None, x.sum())
        return 2 * x

    x = array(8, 8)
    plan = gspmd.plan(told, x, mesh=MESH, in_specs=P("x"))
    (finding,) = plan.findings
    assert "runs whole on every device, with its side effect: 0 bytes" in finding.message
    jax.block_until_ready(plan.run(x))
    jax.effects_barrier()
    assert len(seen) == 8
    np.testing.assert_allclose(seen, x.sum(), rtol=1e-4)


def test_strict_names_them() -> None:
    with pytest.raises(gspmd.StrictError, match=r"pure_callback at .*test_opaque.py:\d+ has no"):
        gspmd.plan(sine, array(8, 8), mesh=MESH, in_specs=P("x"), strict=True)
