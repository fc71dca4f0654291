"""GLaM: the paper's sizes, what a mixture sends, and the same step on any mesh."""

import collections
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gspmd
from gspmd import P
from gspmd.models import glam, text, transformer
from gspmd.models.blocks import Mixture, ModelError
from gspmd.models.glam import CONFIGS, RULES, Config, rules_for
from gspmd.models.routing import ROUTERS, Top2
from gspmd.models.tasks import RECIPES
from gspmd.models.training import TrainConfig, init_state, make_optimizer, make_step
from gspmd.testing import assert_equivalent

MINI = dataclasses.replace(
    CONFIGS["tiny"],
    vocab=32,
    model_dim=8,
    hidden_dim=16,
    heads=2,
    head_dim=4,
    seq=8,
    experts=4,
    group_size=None,
)


def shapes(config: Config) -> Any:
    return jax.eval_shape(functools.partial(glam.init, config), jax.random.key(0))


@functools.cache
def params(config: Config = MINI) -> transformer.Params:
    """Parameters drawn by numpy, which is quicker than to compile their drawing."""
    draw = np.random.default_rng(0).normal
    return jax.tree.map(lambda x: jnp.asarray(0.3 * draw(size=x.shape), x.dtype), shapes(config))


def batch(size: int = 4) -> dict[str, jax.Array]:
    tokens = jax.random.randint(jax.random.key(1), (size, MINI.seq + 1), 0, MINI.vocab)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


# ------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    ("name", "total", "active", "printed"),
    [
        ("0.1B_64E", 1_907_612_928, None, (1.9, None)),
        ("1.7B_32E", None, 1_878_374_400, (None, 1.878)),
        ("1.7B_64E", 26_843_658_240, 1_879_160_832, (27, 1.879)),
        ("1.7B_128E", 52_615_034_880, 1_880_733_696, (53, 1.881)),
        ("8B", 8_721_305_600, 8_721_305_600, (8.7, 8.7)),
        ("8B_64E", 142_943_227_904, 9_799_241_728, (143, 9.8)),
        ("137B", 137_702_416_384, 137_702_416_384, (137, None)),
        ("64B_64E", 1_161_756_418_048, 96_604_528_640, (1162, 96.6)),
    ],
)
def test_parameters_are_those_of_the_papers_table(name, total, active, printed):
    """`printed` are billions as the paper has them, in as many digits; 137.7 is cut to 137."""
    counts = glam.parameter_count(CONFIGS[name]), glam.active_count(CONFIGS[name])
    for count, expected, billions in zip(counts, (total, active), printed, strict=True):
        if expected is not None:
            assert count == expected
        if billions is not None and name != "137B":
            digits = len(str(billions).partition(".")[2])
            assert round(count / 1e9, digits) == billions


def test_mixtures_and_dense_layers_alternate():
    layers = shapes(CONFIGS["64B_64E"])["layers"]
    M, H, E, pairs = 8192, 32_768, 64, 32
    assert layers["sparse"].keys() == {"attention_norm", "attention", "mlp_norm", "mixture"}
    assert layers["dense"].keys() == {"attention_norm", "attention", "mlp_norm", "mlp"}
    sparse, dense = layers["sparse"]["mixture"], layers["dense"]["mlp"]
    assert jax.tree.map(lambda x: x.shape, sparse) == {
        "router": (pairs, M, E),
        "experts": {"wi": (pairs, E, M, H), "wo": (pairs, E, H, M)},
    }
    assert jax.tree.map(lambda x: x.shape, dense) == {
        "wi": (pairs, M, H), "wi_gate": (pairs, M, H), "wo": (pairs, H, M)
    }  # fmt: skip


def test_a_batch_that_does_not_split_into_groups_is_refused():
    config = dataclasses.replace(MINI, group_size=12)
    message = "a batch of 4 x 8 = 32 tokens does not split into groups of 12; change the batch, or"
    with pytest.raises(ModelError, match=message):
        jax.eval_shape(functools.partial(glam.loss, config), shapes(config), batch())


def test_groups_are_sequences_unless_said_otherwise():
    def places(**changes: Any) -> tuple[int, ...]:
        config = dataclasses.replace(MINI, **changes)
        mixture = jax.eval_shape(lambda: Mixture(config, nnx.Rngs(0), 4))
        x = jax.ShapeDtypeStruct((6, 8, 8), jnp.float32)
        return jax.eval_shape(lambda m, x: m.route(x)[1], mixture, x).combine_GSEC.shape

    assert places() == (6, 8, 4, 4)
    assert places(group_size=24) == (2, 24, 4, 12)
    assert places(group_size=1000) == (1, 48, 4, 24)  # more than there are: one group


@pytest.mark.parametrize("name", ["vmoe", "expert_choice"])
def test_another_router_trains(name: str):
    config = dataclasses.replace(MINI, router=ROUTERS[name])
    optimizer = make_optimizer(TrainConfig())
    step = make_step(functools.partial(glam.loss, config), optimizer, 0)
    state = jax.eval_shape(lambda: init_state(functools.partial(glam.init, config), optimizer, 0))
    after, metrics = jax.eval_shape(step, state, batch())
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert metrics["loss"].shape == ()


# ------------------------------------------------------------------------------------------- plans


def sent(plan: gspmd.Plan) -> dict[str, list[tuple[tuple[str, ...], int]]]:
    """Axes and operand bytes of each collective, by kind, as often as it runs."""
    found: dict[str, list[tuple[tuple[str, ...], int]]] = collections.defaultdict(list)
    for c in plan.collectives:
        found[c.kind] += [(c.axes, int(c.bytes))] * c.trips
    return dict(found)


def mixture_plan(rules: Any, mesh: dict[str, int], *, grad: bool = False) -> gspmd.Plan:
    """One mixture of 8 experts on 16 sequences of 64 tokens, each split as its role says."""
    config = dataclasses.replace(MINI, model_dim=64, hidden_dim=128, seq=64)
    mixture = jax.eval_shape(lambda: Mixture(config, nnx.Rngs(0), 8))
    x = jax.ShapeDtypeStruct((16, 64, 64), jnp.float32)

    def layer(mixture: Mixture, x_BSM: jax.Array):
        y_BSM, loss = mixture(x_BSM)
        return gspmd.annotate(x_BSM + y_BSM, P("batch", None, "act_model")), loss

    def value(mixture: Mixture, x_BSM: jax.Array):
        y_BSM, loss = layer(mixture, x_BSM)
        return jnp.mean(jnp.square(y_BSM)) + loss

    fn = jax.value_and_grad(value, argnums=(0, 1), allow_int=True) if grad else layer
    return gspmd.plan(
        fn, mixture, x, mesh=mesh, rules=rules, in_specs=(None, P("batch", None, "act_model"))
    )


TOKENS, MODEL = 16 * 64, 64
CAPACITY = 2.0  # places per token
EACH_WAY = int(TOKENS * MODEL * CAPACITY * 4)  # bytes in float32, on all devices together


def test_nothing_but_the_tokens_crosses_the_expert_axis():
    """One all_to_all each way, and 4 bytes of balance loss."""
    plan = mixture_plan(rules_for("expert", ("expert",)), {"expert": 8})
    assert sent(plan) == {
        "all_to_all": [(("expert",), EACH_WAY // 8)] * 2,
        "all_reduce": [(("expert",), 4)],
    }
    specs, _ = plan.in_specs
    assert {str(spec) for spec in jax.tree.leaves(specs)} == {
        str(P("expert", None, None)), str(P(None, None))
    }  # fmt: skip


def test_gradients_cross_the_expert_axis_as_the_tokens_do():
    """And the router's weights, of which every device has a part of the gradient."""
    plan = mixture_plan(rules_for("expert", ("expert",)), {"expert": 8}, grad=True)
    found = sent(plan)
    assert found.pop("all_to_all") == [(("expert",), EACH_WAY // 8)] * 4
    assert sum(size for _, size in found.pop("all_reduce")) == 64 * 8 * 4 + 4
    assert not found


def test_experts_split_twice_exchange_a_share_of_each_token():
    plan = mixture_plan(rules_for("expert_2d", ("data", "model")), {"data": 4, "model": 2})
    found = sent(plan)
    assert found["all_to_all"] == [(("data",), EACH_WAY // 8)] * 2
    assert {axes for kind in ("all_gather", "reduce_scatter") for axes, _ in found[kind]} == {
        ("model",)
    }
    assert jax.tree.leaves(plan.in_specs[0].experts) == [
        P("data", None, "model"), P("data", "model", None)
    ]  # fmt: skip


def test_the_trillion_parameter_model_plans_for_1024_cores():
    """Each mixture sends its tokens out and home: forward, rematerialized and backward."""
    config, mesh, size = CONFIGS["64B_64E"], {"data": 16, "model": 64}, 1024
    optimizer = make_optimizer(TrainConfig())
    state = jax.eval_shape(lambda: init_state(functools.partial(glam.init, config), optimizer, 0))
    plan = gspmd.plan(
        make_step(functools.partial(glam.loss, config), optimizer, 0),
        state, glam.batch_shapes(config, size),
        mesh=mesh, rules=rules_for("expert_2d", tuple(mesh)), donate_argnums=0,
    )  # fmt: skip
    assert not plan.findings
    each_way = size * 1024 * 8192 * 2 * 2 // 1024  # tokens x M x capacity in bfloat16, of a device
    exchanged = [item for item in sent(plan)["all_to_all"] if item[0] == ("data",)]
    assert exchanged == [(("data",), each_way)] * (6 * 32)
    # What is gathered over data are weights: no tokens, of which a device has more bytes than that.
    tokens = size // 16 * 1024 * 8192 // 64 * 2
    assert max(size for axes, size in sent(plan)["all_gather"] if axes == ("data",)) < tokens / 4
    experts = plan.in_specs[0]["params"]["layers"]["sparse"]["mixture"]["experts"]
    assert experts == {
        "wi": P(None, "data", None, "model"), "wo": P(None, "data", "model", None)
    }  # fmt: skip


# ---------------------------------------------------------------------------------------- equality


@functools.cache
def whole_step(experts: int):
    """A step to the loss, the gradients, the next state, and who went to which expert where."""
    config = dataclasses.replace(MINI, experts=experts, router=Top2(1.5, multiple=1))
    optimizer = make_optimizer(TrainConfig(warmup=1))
    loss = functools.partial(glam.loss, config)

    def step(state: Any, now: Any):
        value, gradients = jax.value_and_grad(loss)(state["params"], now)
        updates, opt = optimizer.update(gradients, state["opt"], state["params"])
        moved = jax.tree.map(jnp.add, state["params"], updates)
        decided_GSEC = routing_of(config, state["params"], now["inputs"])
        return value, gradients, {"params": moved, "opt": opt}, decided_GSEC

    state = init_state(lambda key: params(config), optimizer, 0)
    return step, {"params": state["params"], "opt": state["opt"]}, batch()


def routing_of(config: Config, params: transformer.Params, tokens_BS: jax.Array) -> jax.Array:
    """What the first mixture dispatches of the embedded tokens."""
    model = transformer._module(config, params)
    first = jax.tree.map(lambda x: x[0], model.layers.sparse)
    x_BSM = first.mlp_norm(model.embed(model.vocabulary(), tokens_BS))
    return first.mixture.route(x_BSM)[1].dispatch_GSEC


def equals(strategy: str, mesh: str, experts: int = 4, on: Any = "simulated") -> None:
    step, state, now = whole_step(experts)
    axes = tuple(axis.partition("=")[0] for axis in mesh.split(","))
    how = {"mesh": mesh, "rules": rules_for(strategy, axes), "in_specs": (None, P("batch"))}
    assert_equivalent(step, state, now, grad=False, on=on, **how)


MESHES = ("data=2,model=2", "data=3,model=2", "data=4,model=1", "data=2,expert=2,model=2")
FAST = (("expert_2d", "data=3,model=2"),)
CASES = [(strategy, mesh) for strategy in RULES for mesh in MESHES]


@pytest.mark.parametrize(
    ("strategy", "mesh"),
    [pytest.param(*c, marks=() if c in FAST else pytest.mark.exhaustive) for c in CASES],
)
def test_a_partitioned_step_is_that_of_one_device(strategy: str, mesh: str):
    equals(strategy, mesh)


def test_a_step_on_devices_is_that_of_one():
    equals("expert_2d", "data=4,model=2", on="devices")


@pytest.mark.exhaustive
@pytest.mark.parametrize("mesh", ["data=4,model=2", "data=3,model=2", "data=2,expert=4,model=1"])
@pytest.mark.parametrize("strategy", RULES)
def test_a_step_of_each_strategy_on_devices_is_that_of_one(strategy: str, mesh: str):
    equals(strategy, mesh, on="devices")


@pytest.mark.exhaustive
@pytest.mark.parametrize(("experts", "mesh"), [(3, "data=4,model=2"), (5, "data=4")])
def test_experts_that_do_not_split_evenly_are_padded(experts: int, mesh: str):
    equals("expert_2d", mesh, experts)


# --------------------------------------------------------------------------------------- training


@pytest.mark.exhaustive
def test_experts_learn_more_than_a_dense_model_of_the_same_work_and_share_it():
    """On the source code of the standard library, held out: a lower loss, and an even load."""
    library, recipe = text.standard_library(), RECIPES["glam"]
    decay = round(recipe.falls * recipe.steps)
    schedule = TrainConfig(recipe.steps, learning_rate=recipe.learning_rate, decay=decay)

    def held_out(name: str) -> dict[str, jax.Array]:
        config = CONFIGS[name]
        optimizer = make_optimizer(schedule)
        step = make_step(functools.partial(glam.loss, config), optimizer, 0)
        fresh = functools.partial(init_state, functools.partial(glam.init, config), optimizer, 0)

        @functools.partial(jax.jit, donate_argnums=0)
        def steps(state: Any, batches: Any):
            return jax.lax.scan(lambda state, now: (step(state, now)[0], None), state, batches)[0]

        def draw(source: np.ndarray, seed: int, first: int, count: int, size: int):
            each = functools.partial(text.batch, source, seed=seed, batch_size=size, seq=config.seq)
            batches = [each(step=first + i) for i in range(count)]
            return jax.tree.map(lambda *xs: np.stack(xs), *batches)

        state = jax.jit(fresh)()
        for first in range(0, schedule.steps, 50):
            state = steps(state, draw(library.train, 0, first, 50, recipe.batch_size))
        evaluate = functools.partial(glam.evaluate, config, state["params"])
        rows = draw(library.held_out, 1, 0, 8, 64)
        return jax.tree.map(jnp.mean, jax.jit(lambda rows: jax.lax.map(evaluate, rows))(rows))

    dense, sparse = held_out("tiny_dense"), held_out("tiny")
    # 0.066 to 0.077 less, with three seeds
    assert sparse["cross_entropy"] + 0.04 < dense["cross_entropy"] < 1.6
    assert 0.99 < sparse["routers"] / 0.01 < 1.15
