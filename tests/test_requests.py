"""More than whole blocks: sub-axes, uneven dims; and what JAX itself has to say of a split."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import agrees, kinds
from jax import lax
from jax.sharding import NamedSharding

import gspmd
from gspmd import P

# --- sub-axes


@pytest.mark.parametrize("shape", [(4, 6), (2, 12), (2, 2, 6), (8, 3), (6, 4), (2, 3, 4), (3, 8)])
def test_a_split_dim_may_be_reshaped(shape: tuple[int, ...]) -> None:
    def fn(x: jax.Array) -> jax.Array:
        return jnp.sin(x.reshape(shape)).reshape(24)

    x = np.arange(24, dtype=np.float32)
    plan = gspmd.plan(fn, x, mesh="x=8", in_specs=(P("x"),), out_specs=P("x"))
    agrees(plan, fn, x)
    # 8 runs of 3 elements are boxes of the new shape, unless they break off inside a row.
    boxes = shape not in ((6, 4), (2, 3, 4), (3, 8))
    assert kinds(plan) == ({} if boxes else {"all_gather": 1})
    assert plan.in_specs == (P("x"),)


def test_microbatches_come_out_of_a_split_batch() -> None:
    """(accumulation, batch): steps major, so that each holds a part of every device's examples."""

    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        def step(total: jax.Array, part: jax.Array) -> tuple[jax.Array, None]:
            return total + part.T @ jnp.tanh(part @ w), None

        parts = jnp.swapaxes(x.reshape(8, 3, 5), 0, 1)
        return lax.scan(step, jnp.zeros((5, 5)), parts)[0]

    rng = np.random.default_rng(0)
    args = rng.normal(size=(5, 5)).astype("f"), rng.normal(size=(24, 5)).astype("f")
    plan = gspmd.plan(fn, *args, mesh="x=8", in_specs=(P(), P("x")), out_specs=P())
    assert kinds(plan) == {"all_reduce": 1}
    agrees(plan, fn, *args)


@pytest.mark.parametrize("mesh", ["x=8", "x=4", "x=6", "x=5", "x=2,y=3"])
@pytest.mark.parametrize("steps", [2, 3, 4])
def test_a_batch_split_into_accumulation_and_batch(mesh: str, steps: int) -> None:
    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        def one(w: jax.Array, x: jax.Array) -> jax.Array:
            return jnp.mean(jnp.tanh(x @ w))

        def step(total: jax.Array, part: jax.Array) -> tuple[jax.Array, None]:
            return total + jax.grad(one)(w, part), None

        return lax.scan(step, jnp.zeros_like(w), x.reshape(steps, -1, 5))[0]

    rng = np.random.default_rng(0)
    args = rng.normal(size=(5, 5)).astype("f"), rng.normal(size=(24, 5)).astype("f")
    axes = tuple(part.split("=")[0] for part in mesh.split(","))
    plan = gspmd.plan(fn, *args, mesh=mesh, in_specs=(None, P(axes)))
    agrees(plan, fn, *args)


# --- uneven dims


def uneven_fn(x: jax.Array, w: jax.Array) -> dict[str, jax.Array]:
    y = jnp.einsum("abc,cd->abd", x, w)
    return {
        "product": y,
        "softmax": jax.nn.softmax(y, axis=-1),
        "max": jnp.max(x, axis=(0, 2)),
        "mean": jnp.mean(x, axis=1),
        "prod": jnp.prod(jnp.sign(x), axis=0),
        "moved": jnp.concatenate([x, x[::-1]], axis=0).transpose(2, 0, 1)[1:],
    }


@pytest.mark.parametrize("dim", range(5))
def test_uneven_dims_in_every_position(dim: int) -> None:
    rng = np.random.default_rng(0)
    args = rng.normal(size=(5, 7, 3)).astype("f"), rng.normal(size=(3, 6)).astype("f")
    entries: list[Any] = [None] * 5
    entries[dim] = "x"
    specs = P(*entries[:3]), P(*entries[3:])
    plan = gspmd.plan(uneven_fn, *args, mesh="x=4,y=2", in_specs=specs)
    agrees(plan, uneven_fn, *args)


@pytest.mark.parametrize("axes", [("x", "y"), ("y", "x")])
def test_uneven_dims_over_two_axes_and_more_devices_than_rows(axes: tuple[str, str]) -> None:
    rng = np.random.default_rng(0)
    args = rng.normal(size=(5, 7, 3)).astype("f"), rng.normal(size=(3, 6)).astype("f")
    for spec in (P(axes), P(None, axes), P(None, None, axes), P(axes[0], None, axes[1])):
        plan = gspmd.plan(uneven_fn, *args, mesh="x=4,y=3", in_specs=(spec, None))
        agrees(plan, uneven_fn, *args)


# --- annotations from JAX itself


def test_constraints_of_jax_are_read() -> None:
    mesh = jax.make_mesh((2, 4), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)
    x = np.ones((8, 8), np.float32)

    def named(x: jax.Array) -> jax.Array:
        return lax.with_sharding_constraint(x * 2, NamedSharding(mesh, P("data", "model")))

    def bare(x: jax.Array) -> jax.Array:
        return lax.with_sharding_constraint(x * 2, P("data", "model"))

    def loose(x: jax.Array) -> jax.Array:
        x = lax.with_sharding_constraint(x * 2, P(P.UNCONSTRAINED, "model"))
        return lax.with_sharding_constraint(x * 2, P("data", P.UNCONSTRAINED))

    assert gspmd.plan(named, x, mesh=mesh).out_specs == P("data", "model")
    with jax.set_mesh(mesh):
        for fn in (bare, loose):
            plan = gspmd.plan(fn, x, mesh=mesh)
            assert plan.out_specs == P("data", "model")
            assert plan.collectives == ()


def test_shardings_of_jit_are_read() -> None:
    mesh = jax.make_mesh((2, 4), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)
    rows, columns = (NamedSharding(mesh, spec) for spec in (P("data"), P(None, "model")))
    x = np.ones((8, 8), np.float32)
    fn = jax.jit(lambda x: x * 2, in_shardings=rows, out_shardings=columns)
    plan = gspmd.plan(fn, x, mesh=mesh)
    assert plan.in_specs == (P("data", None),)
    assert plan.out_specs == P(None, "model")
    inner = gspmd.plan(lambda x: fn(x) + 1, x, mesh=mesh)
    assert inner.out_specs == P(None, "model")


def test_committed_arguments_keep_their_place() -> None:
    mesh = jax.make_mesh((2, 4), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)
    x = jax.device_put(np.ones((8, 8), np.float32), NamedSharding(mesh, P("model")))
    plan = gspmd.plan(lambda x: x * 2, x, mesh=mesh)
    assert plan.in_specs == (P("model", None),)
    asked = gspmd.plan(lambda x: x * 2, x, mesh=mesh, in_specs=(P("data"),))
    assert asked.in_specs == (P("data", None),)
