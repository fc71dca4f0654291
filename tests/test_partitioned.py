"""gspmd.partition: a callable that plans once, runs on eight devices, and composes as any other."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

import gspmd
from gspmd import ArgumentError, MeshError, P, SpecError, TraceError
from gspmd.uneven import Uneven

KINDS = [AxisType.Auto, AxisType.Explicit, AxisType.Manual]
RULES = {"batch": "data", "mlp": "model"}
Params = dict[str, jax.Array]


def mlp(params: Params, x: jax.Array) -> jax.Array:
    h = gspmd.annotate(jax.nn.gelu(x @ params["wi"]), P("batch", "mlp"))
    return h @ params["wo"]


def loss(params: Params, x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(mlp(params, x)))


def inputs(batch: int = 16) -> tuple[Params, Any]:
    rng = np.random.default_rng(0)
    params = {
        "wi": rng.normal(size=(6, 8)).astype("f"), "wo": rng.normal(size=(8, 6)).astype("f"),
    }  # fmt: skip
    return params, rng.normal(size=(batch, 6)).astype("f")


def mesh_of(kind: AxisType = AxisType.Auto, shape: tuple[int, int] = (2, 4)) -> jax.sharding.Mesh:
    return jax.make_mesh(shape, ("data", "model"), (kind, kind))


def partitioned(fn: Callable[..., Any], mesh: Any = None, **options: Any) -> gspmd.Partitioned:
    given = {"rules": RULES, "in_specs": (None, P("batch")), **options}
    return gspmd.partition(fn, mesh_of() if mesh is None else mesh, **given)


def same(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.shape == np.shape(y)
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-4, atol=1e-5)


def entered(mesh: jax.sharding.Mesh) -> contextlib.AbstractContextManager[Any]:
    """The context that JAX itself wants around a gradient on a mesh with Explicit axes."""
    explicit = AxisType.Explicit in mesh.axis_types
    return jax.set_mesh(mesh) if explicit else contextlib.nullcontext()


# --- planning


def test_known_types_are_planned_once() -> None:
    traces: list[tuple[int, ...]] = []

    def counted(params: Params, x: jax.Array) -> jax.Array:
        traces.append(x.shape)
        return mlp(params, x)

    step = partitioned(counted)
    params, x = inputs()
    plan = step.plan(params, x)
    for args in ((params, x), (params, x + 1), (params, jnp.asarray(x))):
        same(step(*args), mlp(*args))
        assert step.plan(*args) is plan
    avals = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (params, x))
    assert step.plan(*avals) is plan
    assert traces == [(16, 6)]
    same(step(params, x[:8]), mlp(params, x[:8]))
    assert traces == [(16, 6), (8, 6)]
    assert step.plan(params, x[:8]) is not plan
    assert step.plan(params, x.astype(np.int32)) is not plan
    assert plan.executable is plan.executable


def test_it_looks_like_the_function() -> None:
    step = partitioned(mlp)
    assert step.__name__ == "mlp"
    assert step.__wrapped__ is mlp
    assert repr(step) == "<gspmd.partition of mlp on data=2, model=4>"


def test_static_arguments_are_part_of_the_plan() -> None:
    def power(x: jax.Array, n: int, scale: float = 1.0) -> jax.Array:
        return scale * x**n

    step = gspmd.partition(power, mesh_of(), in_specs=(P("data"),), static_argnums=1)
    x = np.arange(8, dtype=np.float32)
    same(step(x, 2), x**2)
    same(step(x, 3), x**3)
    same(step(x, 3, scale=2.0), 2 * x**3)
    assert step.plan(x, 2) is step.plan(x + 1, 2) is not step.plan(x, 3)
    with pytest.raises(TraceError, match="a static argument of power cannot be hashed"):
        step(x, [2])


def test_integers_and_keys_are_arguments() -> None:
    def fn(x: jax.Array, step: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        keep = jax.random.bernoulli(key, 0.5, x.shape)
        return {"y": jnp.where(keep, x * step, 0), "next": step + 1}

    x = np.arange(24, dtype=np.float32).reshape(8, 3)
    args = x, np.int32(3), jax.random.key(1)
    step = gspmd.partition(fn, mesh_of(), in_specs=(P("data", "model"), None, None))
    same(step(*args), fn(*args))
    same(step(*map(jnp.asarray, args)), fn(*args))  # all of them on devices
    got = step(x, 3, jax.random.key(1))  # a Python scalar
    assert got["next"] == 4
    assert got["next"].dtype == jnp.int32


# --- results


def test_results_are_sharded_arrays() -> None:
    mesh = mesh_of()
    params, x = inputs()
    step = partitioned(mlp, mesh, out_specs=P("batch"))
    y = step(params, x)
    assert y.sharding == NamedSharding(mesh, P("data", None))
    assert {shard.data.shape for shard in y.addressable_shards} == {(8, 6)}
    assert step.plan(params, x).out_specs == P("data", None)


def test_uneven_arrays_go_round() -> None:
    """What comes out uneven goes in again as it is, and reads as its logical self."""
    params, x = inputs(batch=7)
    step = partitioned(mlp, out_specs=P("batch"))
    y = step(params, x)
    assert isinstance(y, Uneven)
    assert y.shape == (7, 6)
    assert [s.data.shape[0] for s in y.addressable_shards][::4] == [4, 3]
    same(y, mlp(params, x))
    same(step(params, y), mlp(params, np.asarray(y)))
    assert step.plan(params, y) is step.plan(params, x)
    same(y[2:5], mlp(params, x)[2:5])
    same(jnp.tanh(jnp.asarray(y)), jnp.tanh(mlp(params, x)))


def test_uneven_parameters_train_without_being_gathered() -> None:
    def step(w: jax.Array, x: jax.Array) -> jax.Array:
        return w - 0.1 * jax.grad(lambda w: jnp.mean(jnp.square(x @ w)))(w)

    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(5, 7)).astype("f"), rng.normal(size=(8, 5)).astype("f")
    specs = P("model", "data")
    run = gspmd.partition(step, mesh_of(), in_specs=(specs, None), out_specs=specs)
    got: Any = w
    for _ in range(3):
        got, w = run(got, x), np.asarray(step(w, x))
        assert isinstance(got, Uneven)
    same(got, w)


def test_donated_arguments_are_gone() -> None:
    params, x = inputs()
    mesh = mesh_of()

    def step(params: Params, x: jax.Array) -> Params:
        return jax.tree.map(lambda p, g: p - g, params, jax.grad(loss)(params, x))

    run = partitioned(step, mesh, donate_argnums=0, out_specs={"wi": P(), "wo": P()},
                      in_specs=({"wi": P(), "wo": P()}, P("batch")))  # fmt: skip
    placed = jax.device_put(params, NamedSharding(mesh, P()))
    x = jax.device_put(x, NamedSharding(mesh, P("data")))
    new = run(placed, x)
    same(new, step(params, x))
    assert all(leaf.is_deleted() for leaf in placed.values())
    assert not x.is_deleted()


# --- composing


@pytest.mark.parametrize("batch", [16, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_transformations(kind: AxisType, batch: int) -> None:
    params, x = inputs(batch)
    xs = np.stack([x, x + 1, x * 2])
    mesh = mesh_of(kind)
    f = partitioned(loss, mesh)
    same(f(params, x), loss(params, x))
    with entered(mesh):
        same(jax.jit(f)(params, x), loss(params, x))
        same(jax.grad(f)(params, x), jax.grad(loss)(params, x))
        same(jax.jit(jax.value_and_grad(f))(params, x), jax.value_and_grad(loss)(params, x))
        same(jax.vmap(f, (None, 0))(params, xs), jax.vmap(loss, (None, 0))(params, xs))


@pytest.mark.parametrize("kind", KINDS)
def test_results_that_are_split_have_gradients(kind: AxisType) -> None:
    mesh = mesh_of(kind)
    params, x = inputs()
    f = partitioned(mlp, mesh, out_specs=P("batch"))

    def total(fn: Callable[..., Any]) -> Callable[..., Any]:
        return lambda p: jnp.sum(fn(p, x) * 2.0)

    with entered(mesh):
        same(jax.grad(total(f))(params), jax.grad(total(mlp))(params))


def test_uneven_arrays_have_gradients() -> None:
    """A parameter that came out of a step uneven is differentiated like any other."""
    w = np.random.default_rng(0).normal(size=(5, 7)).astype("f")
    even = gspmd.partition(lambda w: w, mesh_of(), in_specs=P("model", "data"))
    f = gspmd.partition(lambda w: jnp.sum(jnp.sin(w)), mesh_of(), in_specs=P("model", "data"))
    same(f(even(w)), jnp.sum(jnp.sin(w)))
    same(jax.grad(f)(jnp.asarray(even(w))), jnp.cos(w))


def test_the_gradient_of_a_gradient() -> None:
    params, x = inputs()
    f = partitioned(loss)

    def norm(fn: Callable[..., Any]) -> Callable[[Params], Any]:
        grad = jax.grad(fn)
        return lambda p: sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grad(p, x)))

    same(jax.grad(norm(f))(params), jax.grad(norm(loss))(params))


def test_integer_arguments_have_no_gradient() -> None:
    def fn(table: jax.Array, ids: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(table[ids]))

    table = np.random.default_rng(0).normal(size=(9, 4)).astype("f")
    ids = np.array([0, 3, 3, 8], np.int32)
    f = gspmd.partition(fn, mesh_of(), in_specs=(P("model"), P("data")))
    same(jax.grad(f)(table, ids), jax.grad(fn)(table, ids))
    same(jax.vmap(jax.grad(f), (None, 0))(table, ids[:, None]),
         jax.vmap(jax.grad(fn), (None, 0))(table, ids[:, None]))  # fmt: skip


def test_it_is_called_inside_of_larger_programs() -> None:
    params, x = inputs()
    f = partitioned(mlp)

    @jax.jit
    def chain(params: Params, x: jax.Array) -> jax.Array:
        def body(h: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jnp.tanh(f(params, h)), None

        return jax.lax.scan(body, x, None, length=3)[0]

    want = functools.reduce(lambda h, _: jnp.tanh(mlp(params, h)), range(3), jnp.asarray(x))
    same(chain(params, x), want)


def test_the_gradient_is_partitioned_too() -> None:
    """The backward pass of a Megatron layer sums over `data`, and gathers nothing."""
    params, x = inputs()
    text = jax.jit(jax.grad(partitioned(loss))).lower(params, x).as_text()
    assert "all_reduce" in text
    assert "all_gather" not in text


# --- bad calls


def test_what_is_refused_at_once() -> None:
    with pytest.raises(TraceError, match="takes a function, got 3 of type int"):
        gspmd.partition(3, "x=2")  # pyright: ignore[reportArgumentType]
    with pytest.raises(MeshError, match="'x' is not NAME=SIZE"):
        gspmd.partition(mlp, "x")
    with pytest.raises(SpecError, match=r"rules\['mlp'\] names mesh axis 'modle'.*'model'"):
        gspmd.partition(mlp, "data=2,model=4", rules={"mlp": "modle"})


def test_too_few_devices() -> None:
    step = partitioned(mlp, "data=4,model=8")
    params, x = inputs()
    same(step.plan(params, x).simulate(params, x), mlp(params, x))
    with pytest.raises(MeshError, match=r"needs 32 devices, .* has 8; use plan\.simulate"):
        step(params, x)


def test_arrays_on_other_devices() -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    params, x = inputs()
    elsewhere = jax.device_put(x, jax.devices()[7])
    with pytest.raises(MeshError, match="argument x lies on cpu:7"):
        partitioned(mlp, mesh)(params, elsewhere)


def test_a_plan_refuses_other_shapes() -> None:
    params, x = inputs()
    plan = partitioned(mlp).plan(params, x)
    with pytest.raises(ArgumentError, match=r"argument x was planned with shape \(16, 6\)"):
        plan.run(params, x[:8])


def test_specs_are_checked_at_the_first_call() -> None:
    params, x = inputs()
    step = partitioned(mlp, in_specs=(None, P("batch", "data")))
    with pytest.raises(SpecError, match=r"in_specs for x: .* same mesh axis 'data'"):
        step(params, x)
