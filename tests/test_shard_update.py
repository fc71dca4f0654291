"""Weight-update sharding: which inputs are state, how they are split, and what that costs."""

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax, tree_util

import gspmd
from gspmd import P
from gspmd.ir import bytes_of
from gspmd.shard_update import shard_update

BATCH, FEATURES, HIDDEN = 256, 16, 24
Arrays = dict[str, Any]
Specs = tuple[P | None, P | None, P | None]
GIVEN: Specs = (P(), None, P("data"))  # parameters, state, batch


def arrays(**shapes: tuple[int, ...]) -> Arrays:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype("f") for name, shape in shapes.items()}


W = arrays(up=(FEATURES, HIDDEN), down=(HIDDEN, FEATURES), bias=(HIDDEN,))
X = arrays(x=(BATCH, FEATURES))["x"]


def loss(w: Arrays, x: Any) -> Any:
    return jnp.mean(jnp.square(jnp.tanh(x @ w["up"] + w["bias"]) @ w["down"] - x))


def train_step(optimizer: Any, loss: Callable[..., Any] = loss) -> Callable[..., Any]:
    def step(w: Arrays, state: Any, x: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(w, x)
        updates, state = optimizer.update(gradients, state, w)
        return optax.apply_updates(w, updates), state, value

    return step


def planned(
    step: Callable[..., Any], state: Any, in_specs: Any = GIVEN, w: Arrays = W, x: Any = X,
    mesh: str = "data=8", new_state: P | None = None,
) -> gspmd.Plan:  # fmt: skip
    outs = (in_specs[0], new_state, P())
    return gspmd.plan(step, w, state, x, mesh=mesh, in_specs=in_specs, out_specs=outs)


def found(plan: gspmd.Plan, given: Specs = GIVEN) -> dict[str, Any]:
    """The split of each input that is state, by name."""
    args, _ = tree_util.tree_unflatten(plan.traced.in_tree, plan.model.ins)
    shardings = plan.propagated.shardings
    fixed = {
        value: shardings[value].dims
        for arg, spec in zip(args, given, strict=True)
        if spec is not None
        for value in tree_util.tree_leaves(arg)
    }
    splits = shard_update(plan.model, fixed, shardings, plan.mesh)
    return {value.name: split for value, split in splits.items()}


def with_split_state(step: Callable[..., Any], state: Any, **options: Any) -> gspmd.Plan:
    """The plan whose state is split as `shard_update` says."""
    splits = found(planned(step, state, **options))

    def spec(path: Any, leaf: Any) -> P | None:
        name = "/".join(("state", *tree_util.keystr(path, simple=True, separator="/").split("/")))
        entries = splits.get(name)
        return entries and P(*(P.UNCONSTRAINED if axes is None else axes for axes in entries))

    specs = (GIVEN[0], tree_util.tree_map_with_path(spec, state), GIVEN[2])
    return planned(step, state, specs, **options)


def state_bytes(plan: gspmd.Plan) -> float:
    return bytes_of(x for x in plan.program.ins if x.name.startswith("state/") and x.shape)


def sent(plan: gspmd.Plan) -> dict[str, float]:
    total: dict[str, float] = collections.defaultdict(float)
    for c in plan.collectives:
        total[c.kind] += c.wire_bytes * c.trips
    return dict(total)


def test_adamw_on_split_data() -> None:
    optimizer = optax.adamw(1e-3)
    step, state = train_step(optimizer), optimizer.init(W)
    before, after = planned(step, state), with_split_state(step, state)
    assert found(before) == {
        f"state/0/{moment}/{name}": split
        for moment in ("mu", "nu")
        for name, split in {
            "up": (None, ("data",)), "down": (("data",), None), "bias": (("data",),),
        }.items()
    }  # fmt: skip
    assert state_bytes(after) == state_bytes(before) / 8
    parameters, scalar = sum(x.nbytes for x in W.values()), 2 * 7 / 8 * 4
    once = 7 / 8 * parameters
    assert sent(before) == {"all_reduce": 2 * once + scalar}
    assert sent(after) == {"reduce_scatter": once, "all_gather": once, "all_reduce": scalar}
    assert after.in_specs[1] == after.out_specs[1]  # what goes out can come in again
    want = step(W, state, X)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        after.simulate(W, state, X),
        want,
    )


OPTIMIZERS = {
    "momentum": optax.sgd(0.1, momentum=0.9),
    "clipped adam": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
    "rmsprop": optax.rmsprop(1e-3),
    "lion": optax.lion(1e-3),
    "scheduled": optax.adamw(optax.cosine_decay_schedule(1e-3, 100)),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_state_of_optimizers(optimizer: Any) -> None:
    step, state = train_step(optimizer), optimizer.init(W)
    before, after = planned(step, state), with_split_state(step, state)
    moments = [x for x in tree_util.tree_leaves(state) if np.ndim(x)]
    assert len(found(before)) == len(moments) > 0
    assert state_bytes(after) == state_bytes(before) / 8
    gathered = 7 / 8 * sum(x.nbytes for x in W.values())
    assert sent(after)["all_gather"] == gathered
    few = 10 * 4  # the loss and the norm
    assert after.wire_bytes <= before.wire_bytes + few


def scanned(w: Arrays, x: Any) -> Any:
    def layer(h: Any, w: Any) -> tuple[Any, None]:
        return h + jnp.tanh(h @ w), None

    return jnp.mean(jnp.square(lax.scan(layer, x, w["layers"])[0]))


def accumulated(w: Arrays, x: Any) -> Any:
    def add(total: Any, part: Any) -> tuple[Any, None]:
        return total + loss(w, part), None

    return lax.scan(add, 0.0, x.reshape(BATCH // 4, 4, FEATURES).swapaxes(0, 1))[0]


def test_gradients_that_arise_in_loops() -> None:
    optimizer = optax.sgd(0.1, momentum=0.9)
    w = arrays(layers=(3, FEATURES, FEATURES))
    plan = planned(train_step(optimizer, scanned), optimizer.init(w), w=w)
    assert found(plan) == {"state/0/trace/layers": (None, ("data",), None)}
    plan = planned(train_step(optimizer, accumulated), optimizer.init(W))
    assert set(found(plan)) == {f"state/0/trace/{name}" for name in W}


def test_state_that_follows_its_parameter_is_split_further() -> None:
    optimizer = optax.sgd(0.1, momentum=0.9)
    step, state = train_step(optimizer), optimizer.init(W)
    given = ({"up": P(None, "model"), "down": P("model", None), "bias": P("model")}, *GIVEN[1:])
    plan = planned(step, state, given, mesh="data=4,model=2")
    splits = found(plan)
    assert splits["state/0/trace/up"] == (None, ("model", "data"))
    assert splits["state/0/trace/down"] == (("model", "data"), None)


def test_what_is_no_state_stays() -> None:
    optimizer = optax.sgd(0.1, momentum=0.9)
    step, state = train_step(optimizer), optimizer.init(W)
    fixed: Specs = (P(), P(), P("data"))
    assert not found(planned(step, state, fixed), fixed)
    whole: Specs = (P(), None, P())
    assert not found(planned(step, state, whole), whole)  # each device has the whole batch
    assert not found(planned(step, state, new_state=P()))  # it has to come out whole
    every: Specs = (None, None, P("data"))  # the parameters: products read them
    assert all(name.startswith("state/") for name in found(planned(step, state, every), every))

    def projected(w: Arrays, state: Any, x: Any) -> Any:
        new, state, value = step(w, state, x)
        return new, state, value + jnp.sum(state[0].trace["up"] @ state[0].trace["down"])

    assert set(found(planned(projected, state))) == {"state/0/trace/bias"}
    odd = arrays(up=(15, 7), down=(7, 15), bias=(7,))
    assert not found(planned(step, optimizer.init(odd), w=odd, x=X[:, :15]))  # no equal blocks


def test_the_option_shards_what_the_specs_leave_open() -> None:
    step, optimizer = train_step(optax.adamw(1e-2)), optax.adamw(1e-2)
    given = (step, W, optimizer.init(W), X)
    how: dict[str, Any] = {"mesh": "data=8", "in_specs": GIVEN, "out_specs": (P(), None, P())}
    whole = gspmd.plan(*given, **how)
    split = gspmd.plan(*given, **how, options=gspmd.Options(shard_update=True))
    names = [name for name in found(whole) if name.startswith("state/")]
    assert names
    assert {str(whole.sharding(name)) for name in names} == {str(P(None, None)), str(P(None))}
    assert all("data" in str(split.sharding(name)) for name in names)
    assert split.wire_bytes <= whole.wire_bytes
    for got, want in zip(
        tree_util.tree_leaves(split.simulate(*given[1:])),
        tree_util.tree_leaves(step(*given[1:])),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
