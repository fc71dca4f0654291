"""V-MoE: published sizes, who goes to which expert, other routers at inference, strategies."""

import ast
import dataclasses
import functools
import inspect
import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gspmd
from gspmd import P
from gspmd.models import vision, vmoe
from gspmd.models.routing import RoutingError, TopK
from gspmd.models.training import TrainConfig, make_optimizer, make_step
from gspmd.models.vision import ImageError
from gspmd.models.vmoe import CONFIGS, RULES, Config, rules_for
from gspmd.testing import assert_equivalent

ROUTER = TopK(k=2, capacity_factor=1.0, multiple=1)
MINI = Config(
    image=8, channels=1, patch=4, layers=2, model_dim=8, hidden_dim=12, heads=2, sparse=1,
    experts=4, router=ROUTER, group=2, pre_logits=True, classes=5, dtype=jnp.float32,
)  # fmt: skip
TOKENS = 5  # of an image: four patches and the class token
PLENTY = dataclasses.replace(ROUTER, capacity_factor=4.0)

# Here compiling is the work, not running.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def params(config: Config = MINI) -> vmoe.Params:
    """Parameters that are all drawn alike: the experts of a layer differ."""
    shapes = jax.eval_shape(functools.partial(vmoe.init, config), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) / 2, shapes)


def batch(size: int = 4) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    return {
        "inputs": rng.normal(size=(size, 8, 8, 1)).astype(np.float32),
        "targets": rng.integers(0, 5, size).astype(np.int32),
    }


@functools.cache
def apply(router: TopK | None = None) -> Any:
    return jit(lambda images: vmoe.apply(MINI, params(), images, router=router))


# --------------------------------------------------------------------------------- parameter counts

COUNTS = {  # of released checkpoints
    "s32-last2-in1k": 56_999_400,
    "b16-every2-in21k": 300_974_931,
    "b16-every2-in1k-384": 285_238_504,
}
MILLIONS = {  # as the paper's table prints them
    "s32-dense": 36.5, "s32-every2": 296.9, "b32-dense": 102.1, "b32-every2": 980.6,
    "b16-dense": 100.5, "b16-every2": 979.0, "l32-dense": 325.3, "l32-every2": 3448.2,
    "l32-last2": 845.8, "l16-dense": 323.1, "l16-every2": 3446.0, "h14-dense": 655.8,
    "h14-every2": 7160.8, "h14-last5": 2688.6, "15b": 14_705.1,
}  # fmt: skip


def count(name: str) -> int:
    shapes = jax.eval_shape(functools.partial(vmoe.init, CONFIGS[name]), jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_of_checkpoints_are_counted_exactly(name: str) -> None:
    assert count(name) == COUNTS[name]


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("15b", "h14-last5", "l32-last2")
        else pytest.param(name, marks=pytest.mark.exhaustive)
        for name in MILLIONS
    ],
)  # fmt: skip
def test_parameters_are_those_of_the_paper(name: str) -> None:
    assert round(count(name) / 1e6, 1) == MILLIONS[name]


def test_every_other_layer_has_experts_counted_from_the_last() -> None:
    def layers(name: str) -> tuple[int, ...]:
        shapes = jax.eval_shape(functools.partial(vmoe.init, CONFIGS[name]), jax.random.key(0))
        stacks = shapes.get("dense"), shapes.get("pairs")
        return tuple(0 if s is None else jax.tree.leaves(s)[0].shape[0] for s in stacks)

    found = {name: layers(name) for name in ("s32-dense", "s32-every2", "s32-last2")}
    assert found == {"s32-dense": (8, 0), "s32-every2": (0, 4), "s32-last2": (4, 2)}


def test_experts_start_alike_and_layers_apart() -> None:
    config = dataclasses.replace(MINI, layers=4, sparse=2)

    def kernel(key: jax.Array) -> jax.Array:
        experts = vmoe.init(config, key)["pairs"]["sparse"]["mixture"]["experts"]
        return experts["wi"]["kernel"]

    drawn = np.asarray(jit(kernel)(jax.random.key(0)))
    assert drawn.shape == (2, 4, 8, 12)
    np.testing.assert_array_equal(drawn, np.broadcast_to(drawn[:, :1], drawn.shape))
    assert not np.allclose(drawn[0], drawn[1])


# ---------------------------------------------------------------------------------------- meaning


def test_a_mixture_is_what_its_experts_make_of_the_tokens_that_they_have_places_for() -> None:
    """Token by token, in plain loops: first choices before second ones, in the order of tokens."""
    rng = np.random.default_rng(0)
    B, M, E, k, C = 4, 8, 4, 2, 5  # C = 2 images * 5 tokens * k * 1.0 / E
    mixture = vmoe.Mixture(MINI, nnx.Rngs(0))
    wi, wo = (rng.normal(size=shape).astype(np.float32) for shape in ((E, M, 12), (E, 12, M)))
    bi, bo = (rng.normal(size=shape).astype(np.float32) for shape in ((E, 12), (E, M)))
    mixture.experts.wi.kernel[...], mixture.experts.wo.kernel[...] = wi, wo
    mixture.experts.wi.bias[...], mixture.experts.wo.bias[...] = bi, bo
    x = rng.normal(size=(B, TOKENS, M)).astype(np.float32)

    scores = x @ np.asarray(mixture.router[...])
    gate = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected, lost = np.zeros_like(x), 0
    for group in range(2):
        held = Counter[int]()
        for choice in range(k):
            for b in range(2 * group, 2 * group + 2):
                for s in range(TOKENS):
                    e = int(np.argsort(-gate[b, s], kind="stable")[choice])
                    held[e] += 1
                    if held[e] > C:
                        lost += 1
                        continue
                    hidden = np.asarray(jax.nn.gelu(x[b, s] @ wi[e] + bi[e]))
                    expected[b, s] += gate[b, s, e] * (hidden @ wo[e] + bo[e])
    assert lost > 0
    found, routing = jit(lambda x: mixture(x, None))(x)
    assert routing.dispatch_GSEC.shape == (2, 2 * TOKENS, E, C)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_groups_do_not_hear_of_each_other() -> None:
    changed = batch()["inputs"].copy()
    changed[0] += 1
    before, after = apply()(batch()["inputs"]), apply()(changed)
    np.testing.assert_array_equal(before[2:], after[2:])
    assert not np.allclose(before[0], after[0])


def test_a_trained_model_runs_with_another_router() -> None:
    images_BYXC = batch()["inputs"]
    plenty = apply(PLENTY)(images_BYXC)
    first = dataclasses.replace(PLENTY, batch_priority=True)
    np.testing.assert_allclose(apply(first)(images_BYXC), plenty, rtol=1e-5)
    few = dataclasses.replace(ROUTER, k=1, capacity_factor=0.5)
    assert not np.allclose(apply(few)(images_BYXC), plenty)


def test_tokens_go_to_k_experts_at_most_and_experts_have_their_places_at_most() -> None:
    few = dataclasses.replace(ROUTER, capacity_factor=0.5)  # 3 places of 10 tokens
    run = jit(lambda x: [vmoe.taken(MINI, params(), x, router=r) for r in (PLENTY, few)])
    all_of_them, some = map(np.asarray, run(batch()["inputs"]))
    assert all_of_them.shape == (1, 4, TOKENS, 4)
    assert np.all(all_of_them.sum(-1) == 2)
    assert np.all(some <= all_of_them)
    assert some.reshape(2, 2 * TOKENS, 4).sum(1).max() == 3


def test_a_model_without_experts_takes_no_tokens() -> None:
    dense = dataclasses.replace(MINI, sparse=0)
    assert vmoe.taken(dense, params(dense), batch()["inputs"]).shape == (0, 4, TOKENS, 4)
    assert np.isfinite(vmoe.loss(dense, params(dense), batch(), jax.random.key(0)))


def test_the_loss_is_cross_entropy_and_the_routers_losses() -> None:
    @jit
    def losses(key: jax.Array | None) -> list[jax.Array]:
        free = dataclasses.replace(ROUTER, importance=0.0, load=0.0)
        configs = MINI, dataclasses.replace(MINI, router=free)
        return [vmoe.loss(config, params(), batch(), key) for config in configs]

    full, bare = losses(None)
    scores = apply()(batch()["inputs"])
    expected = vision.sigmoid_cross_entropy(scores, batch()["targets"])
    np.testing.assert_allclose(bare, expected, rtol=1e-5)
    assert 0 < full - bare < 1
    noisy, again, other = (losses(jax.random.key(seed))[0] for seed in (0, 0, 1))
    assert noisy == again != other


# ----------------------------------------------------------------------------------- bad input


def test_bad_input_is_refused() -> None:
    wrong = r"images of shape \(2, 9, 8, 1\): this configuration reads \[batch, 8, 8, 1\]; resize"
    with pytest.raises(ImageError, match=wrong):
        vmoe.apply(MINI, params(), jnp.zeros((2, 9, 8, 1)))
    with pytest.raises(ImageError, match=r"a batch of 3 images does not split into groups of 2; m"):
        vmoe.apply(MINI, params(), jnp.zeros((3, 8, 8, 1)))
    with pytest.raises(RoutingError, match="capacity_factor=0: experts with no places take no tok"):
        dataclasses.replace(ROUTER, capacity_factor=0)
    many = dataclasses.replace(ROUTER, k=5)
    with pytest.raises(RoutingError, match="k=5 experts for each token, but there are 4; lower k"):
        vmoe.apply(MINI, params(), jnp.zeros((2, 8, 8, 1)), router=many)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 3}, "image=8 is no multiple of patch=3; take 6"),
        ({"sparse": 2}, "sparse=2 of 2 layers: every other layer at most has experts; take 1 or"),
        ({"heads": 3}, "heads=3 do not divide model_dim=8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        dataclasses.replace(MINI, **changes)


# ------------------------------------------------------------------------ annotations and tables


def test_the_model_is_annotated_in_few_places_and_every_role_is_used() -> None:
    sources = inspect.getsource(vmoe) + inspect.getsource(vision)
    # a dense kernel, that of the patches, the residual stream
    assert sources.count("annotate(") == 3
    words = {node.value for node in ast.walk(ast.parse(sources)) if isinstance(node, ast.Constant)}
    expert = {role for role in vmoe.ROLES if role.startswith("expert_")}
    assert set(vmoe.ROLES) <= words | expert
    assert {role.removeprefix("expert_") for role in expert} <= words
    assert all(set(rules) == set(vmoe.ROLES) for rules in RULES.values())


@pytest.mark.parametrize(
    ("strategy", "axes", "expected"),
    [
        ("data", ("data", "expert"), {"batch": ("data", "expert"), "expert": None}),
        ("expert", ("data", "expert"), {"batch": ("data", "expert"), "expert": "expert"}),
        ("expert", ("data",), {"batch": ("data",), "expert": "data", "mlp": None}),
        (
            "expert_tensor",
            ("data", "expert", "model"),
            {"batch": ("data", "expert"), "expert": "expert", "expert_mlp": "model"},
        ),
        (
            "expert_fsdp",
            ("data", "expert"),
            {"embed": ("data", "expert"), "expert_embed": "data", "expert": "expert"},
        ),
    ],
)
def test_rules_for(strategy: str, axes: tuple[str, ...], expected: dict[str, Any]) -> None:
    rules = rules_for(strategy, axes)
    assert {name: rules[name] for name in expected} == expected


def test_tokens_travel_to_their_experts_and_back_and_nothing_else_does() -> None:
    """Each way tokens x model dim x places; besides, the loss is added up."""
    config = dataclasses.replace(MINI, model_dim=64, heads=2, pre_logits=False)
    fresh = jax.eval_shape(functools.partial(vmoe.init, config), jax.random.key(0))
    made = gspmd.plan(
        functools.partial(vmoe.loss, config), fresh, batch(8),
        mesh="data=2,expert=2", rules=rules_for("expert", ("data", "expert")),
        in_specs=(None, P("batch")),
    )  # fmt: skip
    here = 8 // 4  # images of a device: one group
    places = config.router.capacity(2 * TOKENS, 4)
    sent = [c for c in made.collectives if c.kind == "all_to_all"]
    assert [(c.axes, c.bytes) for c in sent] == [(("expert",), here // 2 * 4 * places * 64 * 4)] * 2
    assert all(c.bytes <= 8 for c in made.collectives if c not in sent), made.collectives


# --------------------------------------------------------------------------------------- equality

MESHES = {  # one uneven, one with an axis of size 1
    "data": ("data=2", "data=3", "data=1,expert=2"),
    "expert": ("data=2,expert=2", "expert=3", "data=4,expert=1"),
    "expert_tensor": ("expert=2,model=2", "data=1,expert=3,model=2", "data=2,expert=2,model=1"),
    "expert_fsdp": ("data=2,expert=2", "expert=3", "data=3,expert=1"),
}


def axes(mesh: str) -> tuple[str, ...]:
    return tuple(part.partition("=")[0] for part in mesh.split(","))


def step_and_state() -> tuple[Any, dict[str, Any]]:
    """A training step that also returns who went to which expert."""
    optimizer = make_optimizer(TrainConfig(warmup=1))
    step = make_step(functools.partial(vmoe.loss, MINI), optimizer, seed=0)

    def routed(state: Any, batch: Any) -> Any:
        return step(state, batch), vmoe.taken(MINI, state["params"], batch["inputs"])

    return routed, {"params": params(), "opt": optimizer.init(params()), "step": 0}


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("strategy", "mesh"), [(strategy, mesh) for strategy in MESHES for mesh in MESHES[strategy]]
)
def test_a_partitioned_training_step_is_the_step(strategy: str, mesh: str) -> None:
    """Routing exactly; loss, updated parameters and moments, which tell the gradients."""
    step, state = step_and_state()
    assert_equivalent(
        step, state, batch(8), mesh=mesh, rules=rules_for(strategy, axes(mesh)),
        in_specs=(None, P("batch")), grad=False,
    )  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("strategy", "mesh"),
    [
        ("data", "data=8"),
        ("data", "data=3"),
        ("data", "data=1,expert=2"),
        ("expert", "data=2,expert=4"),
        ("expert", "data=2,expert=3"),
        ("expert", "data=4,expert=1"),
        ("expert_tensor", "data=2,expert=2,model=2"),
        ("expert_tensor", "data=1,expert=3,model=2"),
        ("expert_tensor", "data=1,expert=4,model=2"),
        ("expert_fsdp", "data=2,expert=4"),
        ("expert_fsdp", "expert=3"),
        ("expert_fsdp", "data=8,expert=1"),
    ],
)
def test_a_training_step_on_devices_is_the_step(strategy: str, mesh: str) -> None:
    step, state = step_and_state()
    assert_equivalent(
        step, state, batch(16), mesh=mesh, rules=rules_for(strategy, axes(mesh)),
        in_specs=(None, P("batch")), grad=False, on="devices",
    )  # fmt: skip


def test_four_experts_on_three_devices_take_the_same_tokens() -> None:
    def run(params: Any, images_BYXC: Any) -> Any:
        taken = vmoe.taken(MINI, params, images_BYXC)
        return vmoe.apply(MINI, params, images_BYXC), taken

    assert_equivalent(
        run, params(), batch(6)["inputs"], mesh="expert=3",
        rules=rules_for("expert", ("expert",)), in_specs=(None, P("batch")), grad=False,
    )  # fmt: skip
