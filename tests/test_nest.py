"""NesT: published sizes, what a block hears of others, strategies, GradCAT, real images."""

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
from gspmd.errors import SpecError
from gspmd.models import gradcat, images, nest, vision
from gspmd.models.nest import CONFIGS, RULES, Config, rules_for
from gspmd.models.training import TrainConfig, make_optimizer, make_step
from gspmd.models.vision import ImageError
from gspmd.testing import assert_equivalent

MINI = Config(
    image=8, channels=1, patch=1, block=4, dims=(6, 8), layers=(1, 2), heads=(3, 2),
    hidden=2, classes=5, drop_path=0.0, dtype=jnp.float32,
)  # fmt: skip
DEEP = dataclasses.replace(
    MINI, block=2, dims=(4, 4, 8), layers=(1, 1, 1), heads=(1, 1, 1), hidden=1
)

# Here compiling is the work, not running.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def params(config: Config = MINI) -> nest.Params:
    """Fresh parameters, but for biases and scales, which are drawn like all others."""
    shapes = jax.eval_shape(functools.partial(nest.init, config), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) / 3, shapes)


def batch(config: Config = MINI, size: int = 4) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    shape = (size, config.image, config.image, config.channels)
    return {
        "inputs": rng.normal(size=shape).astype(np.float32),
        "targets": rng.integers(0, config.classes, size).astype(np.int32),
    }


@functools.cache
def logits(config: Config = MINI) -> jax.Array:
    return jit(functools.partial(nest.apply, config))(params(config), batch(config)["inputs"])


# ------------------------------------------------------------------------------- sizes and shapes


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("t", 17_057_608),
        ("s", 38_351_176),
        ("b", 67_723_368),
        ("cifar-t", 6_006_730),
        ("cifar-s", 22_849_930),
        ("cifar-b", 89_050_378),
    ],
)
def test_parameters_are_counted_exactly(name: str, count: int) -> None:
    shapes = jax.eval_shape(functools.partial(nest.init, CONFIGS[name]), jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count


def test_fresh_layers_are_drawn_apart_and_small() -> None:
    def kernel(key: jax.Array) -> jax.Array:
        return nest.init(MINI, key)["levels"][1]["blocks"]["layers"]["mlp"]["wi"]["kernel"]

    drawn = np.asarray(jit(kernel)(jax.random.key(0)))
    assert drawn.shape == (2, 8, 16)  # two layers, stacked
    assert not np.array_equal(drawn[0], drawn[1])
    assert np.abs(drawn).max() <= 0.04
    assert drawn.std() == pytest.approx(0.0176, rel=0.1)  # of a normal cut off at two deviations


def test_logits_are_float32_of_each_class() -> None:
    half = dataclasses.replace(MINI, dtype=jnp.bfloat16)
    made = jax.eval_shape(functools.partial(nest.apply, half), params(), batch()["inputs"])
    assert (made.shape, made.dtype) == ((4, 5), jnp.float32)


def test_blocks_are_squares_of_the_plane_and_back() -> None:
    plane = np.arange(2 * 8 * 8 * 3).reshape(2, 8, 8, 3)
    blocks = nest.to_blocks(jnp.asarray(plane), 4)
    assert blocks.shape == (2, 2, 2, 16, 3)
    np.testing.assert_array_equal(blocks[:, 1, 0], plane[:, 4:, :4].reshape(2, 16, 3))
    np.testing.assert_array_equal(nest.to_plane(blocks, 4), plane)


# ---------------------------------------------------------------------------------------- meaning


def test_blocks_hear_of_each_other_by_aggregation_only() -> None:
    """One pixel is changed: the one in row 3, column 5 of the plane, in the upper right block."""

    @jit
    def planes(image: jax.Array) -> list[jax.Array]:
        model = nest.merge(MINI, params())
        first = model.levels[0](image)
        return [first, model.levels[1].enter(first)]

    changed = batch()["inputs"].copy()
    changed[:, 3, 5] += 1
    pairs = zip(planes(batch()["inputs"]), planes(changed), strict=True)
    found = [np.any(np.asarray(a != b), axis=(0, 3)) for a, b in pairs]
    inside = np.zeros((8, 8), bool)
    inside[:4, 4:] = True
    np.testing.assert_array_equal(found[0], inside)
    # The convolution spreads rows 0 to 3 to row 4, which row 2 of the pool reads: its row i has
    # rows 2i to 2i + 2. Columns 4 to 7 spread to column 3, which the pool's column 1 reads.
    reached = np.zeros((4, 4), bool)
    reached[:3, 1:] = True
    np.testing.assert_array_equal(found[1], reached)


def test_one_key_for_all_heads_is_the_same_key_for_each() -> None:
    one = vision.Attention(nnx.Rngs(0), 8, 2, jax.nn.initializers.normal(1.0), multi_query=True)
    each = vision.Attention(nnx.Rngs(0), 8, 2, jax.nn.initializers.normal(1.0))
    each.q, each.out = one.q, one.out
    for mine, shared in ((each.k, one.k), (each.v, one.v)):
        mine.kernel[...] = jnp.repeat(shared.kernel[...][:, None], 2, axis=1)
    x = jax.random.normal(jax.random.key(1), (2, 5, 8))
    np.testing.assert_allclose(one(x), each(x), rtol=1e-5, atol=1e-5)


def test_dropped_paths_follow_their_key_and_keep_the_mean() -> None:
    config = dataclasses.replace(MINI, drop_path=0.5)
    apply = jit(lambda key: nest.apply(config, params(), batch()["inputs"], key=key))
    first, again, other = (apply(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    np.testing.assert_allclose(apply(None), logits(), rtol=1e-6)
    x = jnp.ones((10_000, 1, 1))
    dropped = nest.drop_path(x, jnp.asarray(0.25), jax.random.key(0), 0)
    np.testing.assert_allclose(np.unique(dropped), [0, 1 / 0.75], rtol=1e-6)
    assert float(jnp.mean(dropped)) == pytest.approx(1, abs=0.02)


def test_losses_are_those_of_their_definitions() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(6, 4)).astype(np.float32), rng.integers(0, 4, 6)
    log = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    smooth = -(0.9 * log[np.arange(6), labels] + 0.1 * log.mean(-1)).mean()
    np.testing.assert_allclose(vision.cross_entropy(scores, labels, 0.1), smooth, rtol=1e-5)
    right = np.eye(4)[labels]
    share = 1 / (1 + np.exp(-scores))
    binary = -(right * np.log(share) + (1 - right) * np.log(1 - share)).sum(-1).mean()
    np.testing.assert_allclose(vision.sigmoid_cross_entropy(scores, labels), binary, rtol=1e-5)


def test_the_loss_is_that_of_the_scores() -> None:
    expected = vision.cross_entropy(logits(), batch()["targets"], MINI.smoothing)
    found = jit(functools.partial(nest.loss, MINI))(params(), batch())
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.exhaustive
def test_rematerialization_changes_no_gradient() -> None:
    def gradients(remat: bool) -> Any:
        config = dataclasses.replace(MINI, remat=remat)
        return jit(jax.grad(functools.partial(nest.loss, config)))(params(), batch())

    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, gradients(False), gradients(True))


# ----------------------------------------------------------------------------------- bad input


def test_an_image_of_the_wrong_size_is_refused() -> None:
    message = r"images of shape \(4, 9, 8, 1\): this configuration reads \[batch, 8, 8, 1\]; resize"
    with pytest.raises(ImageError, match=message):
        nest.apply(MINI, params(), jnp.zeros((4, 9, 8, 1)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": 24}, "image=24: 2 levels of 4 x 4 blocks of 1 x 1 patches make images of 8 x 8"),
        ({"heads": (1,)}, "dims, layers and heads have one entry a level, got 2, 2 and 1"),
        ({"heads": (3, 3)}, "heads=3 do not divide dims=8 of level 1"),
    ],
)
def test_levels_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        dataclasses.replace(MINI, **changes)


# ------------------------------------------------------------------------ annotations and tables


def test_the_model_is_annotated_in_few_places_and_every_role_is_used() -> None:
    sources = inspect.getsource(nest) + inspect.getsource(vision)
    assert sources.count("annotate(") == 4  # a dense kernel, the plane, its blocks, a convolution
    words = {node.value for node in ast.walk(ast.parse(sources)) if isinstance(node, ast.Constant)}
    assert set(nest.ROLES) <= words
    assert all(set(rules) == set(nest.ROLES) for rules in RULES.values())


@pytest.mark.parametrize(
    ("strategy", "axes", "expected"),
    [
        ("data", ("data", "rows"), {"batch": ("data", "rows"), "rows": None, "embed": None}),
        ("fsdp", ("data",), {"batch": ("data",), "last_batch": ("data",), "embed": "data"}),
        ("tensor", ("data", "model"), {"batch": ("data",), "heads": "model", "rows": None}),
        ("spatial", ("rows",), {"batch": None, "last_batch": ("rows",), "rows": "rows"}),
        (
            "spatial",
            ("data", "rows", "columns", "model"),
            {
                "batch": ("data",),
                "last_batch": ("data", "rows", "columns"),
                "rows": "rows",
                "columns": "columns",
                "mlp": "model",
            },
        ),
    ],
)
def test_rules_for(strategy: str, axes: tuple[str, ...], expected: dict[str, Any]) -> None:
    rules = rules_for(strategy, axes)
    assert {name: rules[name] for name in expected} == expected


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(SpecError, match="no strategy 'rows': choose one of data, fsdp, tensor, sp"):
        rules_for("rows", ("data",))


def test_spatial_devices_exchange_rows_and_nothing_else_forward() -> None:
    """A convolution fetches a row of each neighbor, a pool one of the next; attention none."""
    made = gspmd.plan(
        functools.partial(nest.apply, MINI), params(), batch()["inputs"],
        mesh="rows=2", rules=rules_for("spatial", ("rows",)), in_specs=(None, P()),
    )  # fmt: skip
    assert Counter(c.kind for c in made.collectives) == {"collective_permute": 2, "all_to_all": 1}
    row = 4 * 8  # float32 of 8 columns; 6 features are convolved, 8 are pooled
    assert [c.bytes // 4 for c in made.collectives] == [row * 6, row * 8, row * 8]


# --------------------------------------------------------------------------------------- equality

MESHES = {  # one uneven, one with an axis of size 1
    "data": ("data=2", "data=3", "data=2,model=1"),
    "fsdp": ("data=2", "data=3", "data=4,model=1"),
    "tensor": ("data=2,model=2", "model=3", "data=1,model=4"),
    "spatial": ("rows=2,columns=2", "rows=3", "data=2,rows=2,columns=1", "rows=2,model=2"),
}


def axes(mesh: str) -> tuple[str, ...]:
    return tuple(part.partition("=")[0] for part in mesh.split(","))


def step_and_state(config: Config = MINI) -> tuple[Any, dict[str, Any]]:
    optimizer = make_optimizer(TrainConfig(warmup=1))
    step = make_step(functools.partial(nest.loss, config), optimizer, seed=0)
    return step, {"params": params(config), "opt": optimizer.init(params(config)), "step": 0}


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("strategy", "mesh"), [(strategy, mesh) for strategy in MESHES for mesh in MESHES[strategy]]
)
def test_a_partitioned_training_step_is_the_step(strategy: str, mesh: str) -> None:
    """Loss, updated parameters and moments, which are sums of the gradients and their squares."""
    config = dataclasses.replace(MINI, drop_path=0.3)
    step, state = step_and_state(config)
    assert_equivalent(
        step, state, batch(config), mesh=mesh, rules=rules_for(strategy, axes(mesh)),
        in_specs=(None, P("batch")), grad=False,
    )  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("strategy", "mesh"),
    [
        ("data", "data=8"),
        ("data", "data=3"),
        ("data", "data=4,model=1"),
        ("fsdp", "data=8"),
        ("fsdp", "data=3"),
        ("fsdp", "data=4,model=1"),
        ("tensor", "data=2,model=4"),
        ("tensor", "data=2,model=3"),
        ("tensor", "data=1,model=4"),
        ("spatial", "data=2,rows=2,columns=2"),
        ("spatial", "rows=3"),
        ("spatial", "rows=2,columns=1,model=2"),
    ],
)
def test_a_training_step_on_devices_is_the_step(strategy: str, mesh: str) -> None:
    step, state = step_and_state()
    assert_equivalent(
        step, state, batch(size=8), mesh=mesh, rules=rules_for(strategy, axes(mesh)),
        in_specs=(None, P("batch")), grad=False, on="devices",
    )  # fmt: skip


def test_scores_of_images_in_uneven_strips_are_the_scores() -> None:
    assert_equivalent(
        functools.partial(nest.apply, MINI), params(), batch()["inputs"],
        mesh="rows=3", rules=rules_for("spatial", ("rows",)), in_specs=(None, P()), grad=False,
    )  # fmt: skip


# ------------------------------------------------------------------------- what the model looks at


LABEL = 3


def test_class_attention_adds_up_to_the_scores() -> None:
    maps = gradcat.class_attention(MINI, params(), batch()["inputs"])
    assert maps.shape == (4, 4, 4, 5)
    found = np.mean(maps, axis=(1, 2)) + params()["head"]["bias"]
    np.testing.assert_allclose(found, logits(), rtol=1e-4, atol=1e-5)


@functools.cache
def relevances() -> list[np.ndarray]:
    found = gradcat.relevances(DEEP, params(DEEP), batch(DEEP, 1)["inputs"], LABEL)
    return [np.asarray(x) for x in found]


def test_relevances_are_features_times_gradients() -> None:
    """A map's sum is how the score f changes with the scale of its features: d/ds f(s A) at 1."""
    assert [x.shape for x in relevances()] == [(1, 8, 8), (1, 4, 4), (1, 2, 2)]

    def score(scales: jax.Array) -> jax.Array:
        model = nest.merge(DEEP, params(DEEP))
        plane = jnp.asarray(batch(DEEP, 1)["inputs"])
        for step, scale in zip((*model.levels, model.norm), scales, strict=True):
            plane = step(plane) * scale
        return model.classify(plane)[0, LABEL]

    expected = jit(jax.grad(score))(jnp.ones(4))
    assert expected[2] == pytest.approx(0, abs=1e-5)  # of the last level before the norm
    found = [np.sum(x) for x in relevances()]
    np.testing.assert_allclose(found, [*expected[:2], expected[3]], rtol=1e-3, atol=1e-5)
    maps = gradcat.class_attention(DEEP, params(DEEP), batch(DEEP, 1)["inputs"])
    np.testing.assert_allclose(relevances()[2], maps[..., LABEL] / 4, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_walk_goes_down_to_the_likeliest_child_of_each_block(sign: int) -> None:
    walk = gradcat.walk(DEEP, params(DEEP), batch(DEEP, 1)["inputs"][0], LABEL, sign=sign)
    _, middle, last = (sign * x[0] for x in relevances())
    first, second = walk.path
    assert first == np.argmax(last)
    y, x = first // 2 * 2, first % 2 * 2
    assert second == np.argmax(middle[y : y + 2, x : x + 2])
    inner = (2 * y + second // 2 * 2, 2 * x + second % 2 * 2, 2)
    assert walk.squares == ((0, 0, 8), (2 * y, 2 * x, 4), inner)
    np.testing.assert_array_equal(walk.maps[0], last)


def test_quarters_are_means_also_of_an_odd_square() -> None:
    even = np.arange(16, dtype=np.float32).reshape(4, 4)
    np.testing.assert_array_equal(gradcat.quarters(even), [[2.5, 4.5], [10.5, 12.5]])
    odd = np.arange(9, dtype=np.float32).reshape(3, 3)
    np.testing.assert_array_equal(gradcat.quarters(odd), [[2, 3], [5, 6]])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"label": 5}, "label=5: there are 5 classes, from 0 on"),
        ({"label": 0, "sign": 0}, "sign=0: it is 1, or -1 for the negative gradient"),
    ],
)
def test_a_walk_for_nothing_is_refused(how: dict[str, int], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        gradcat.walk(MINI, params(), batch()["inputs"][0], **how)


# ------------------------------------------------------------------------------------- real images


def test_the_digits_are_all_there_and_apart() -> None:
    data = images.digits(16)
    assert data.train.shape == (1437, 16, 16, 1)
    assert data.held_out.shape == (360, 16, 16, 1)
    assert (data.train.min(), data.train.max()) == (-1, 1)
    labels = np.concatenate([data.train_labels, data.held_out_labels])
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert np.bincount(data.held_out_labels).min() >= 25


def test_digits_of_their_own_size_are_untouched_and_larger_ones_interpolated() -> None:
    from sklearn.datasets import load_digits

    whole = load_digits().images / 8 - 1
    data = images.digits(8)
    found = np.concatenate([data.train, data.held_out])[..., 0]
    np.testing.assert_allclose(sorted(found.tolist()), sorted(whole.tolist()), rtol=1e-6)
    larger = images.digits(24).train[:, 1::3, 1::3]  # every third sample is an original one
    np.testing.assert_allclose(larger, data.train, rtol=1e-6, atol=1e-6)


def test_digits_smaller_than_they_are_are_refused() -> None:
    with pytest.raises(ImageError, match="images of 7 x 7: the digits have 8 x 8; take 8 or more"):
        images.digits(7)


def test_an_epoch_visits_every_image_once_and_a_step_repeats_itself() -> None:
    data = dataclasses.replace(
        images.digits(8), train=np.arange(12.0).reshape(12, 1, 1, 1), train_labels=np.arange(12)
    )
    draw = functools.partial(images.batch, data, seed=3, batch_size=4)
    epochs = [[draw(step=step)["targets"] for step in range(i, i + 3)] for i in (0, 3)]
    assert all(sorted(np.concatenate(epoch)) == list(range(12)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    np.testing.assert_array_equal(draw(step=7)["inputs"], draw(step=7)["inputs"])
    assert all(draw(step=0)["inputs"].ravel() == draw(step=0)["targets"])


def test_images_are_moved_about_over_background() -> None:
    image = np.arange(9.0, dtype=np.float32).reshape(3, 3, 1)
    moved = images.moved(image, 1, -1)[..., 0]
    np.testing.assert_array_equal(moved, [[-1, -1, -1], [1, 2, -1], [4, 5, -1]])


@pytest.mark.parametrize("size", [0, 2000])
def test_a_batch_that_there_is_not_is_refused(size: int) -> None:
    with pytest.raises(ImageError, match=f"a batch of {size} images: there are 1437 to draw from"):
        images.batch(images.digits(8), seed=0, step=0, batch_size=size)


def test_accuracy_counts_every_image_once() -> None:
    labels = np.arange(7, dtype=np.int32) % 3
    scores = np.eye(3)[[0, 1, 2, 0, 1, 0, 1]]  # the last two are wrong
    shapes: list[tuple[int, ...]] = []

    def apply(x: Any) -> Any:
        shapes.append(x.shape)
        return scores[x[:, 0, 0, 0].astype(int)]

    pixels = np.arange(7, dtype=np.float32).reshape(7, 1, 1, 1)
    assert images.accuracy(apply, pixels, labels, batch_size=4) == 5 / 7
    assert set(shapes) == {(4, 1, 1, 1)}
