"""The transposed NesT and its discriminator: shapes, who learns from what, strategies."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspmd import P
from gspmd.models import nest, nest_gan
from gspmd.models.nest_gan import CONFIGS, Config, rules_for
from gspmd.models.training import TrainConfig, init_state, make_optimizer, make_step
from gspmd.models.vision import ImageError
from gspmd.testing import assert_equivalent

_NEST = nest.Config(
    image=8, channels=1, patch=2, block=2, dims=(4, 8), layers=(1, 1), heads=(2, 2), hidden=1,
    classes=10, drop_path=0.0, dtype=jnp.float32,
)  # fmt: skip
MINI = Config(_NEST, dataclasses.replace(_NEST, classes=1), latent=3)

# Here compiling is the work, not running.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def params(config: Config = MINI) -> nest_gan.Params:
    shapes = jax.eval_shape(functools.partial(nest_gan.init, config), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) / 3, shapes)


def batch(size: int = 4) -> dict[str, Any]:
    images = np.random.default_rng(1).uniform(-1, 1, (size, 8, 8, 1)).astype(np.float32)
    return {"inputs": images, "targets": np.zeros(size, np.int32)}


def test_a_pixel_shuffle_puts_the_features_of_a_position_into_four() -> None:
    x_BYXM = np.arange(2 * 3 * 5 * 8).reshape(2, 3, 5, 8)
    made = np.asarray(nest_gan.pixel_shuffle(jnp.asarray(x_BYXM), 2))
    assert made.shape == (2, 6, 10, 2)
    for y, x in np.ndindex(6, 10):
        first = 2 * (2 * (y % 2) + x % 2)
        expected = x_BYXM[:, y // 2, x // 2, first : first + 2]
        np.testing.assert_array_equal(made[:, y, x], expected)


@pytest.mark.parametrize("name", ["digits", pytest.param("imagenet", marks=pytest.mark.exhaustive)])
def test_images_have_the_size_that_is_read_and_one_score(name: str) -> None:
    config = CONFIGS[name]
    fresh = jax.eval_shape(functools.partial(nest_gan.init, config), jax.random.key(0))
    random_BZ = jax.ShapeDtypeStruct((2, config.latent), jnp.float32)
    made = jax.eval_shape(functools.partial(nest_gan.generate, config), fresh, random_BZ)
    assert (made.shape, made.dtype) == ((2, *config.discriminator.shape), jnp.float32)
    believed = jax.eval_shape(functools.partial(nest_gan.believe, config), fresh, made)
    assert believed.shape == (2,)
    assert nest_gan.batch_shapes(config, 2)["inputs"].shape == made.shape


def test_images_are_light_and_follow_from_their_numbers() -> None:
    random_BZ = np.random.default_rng(2).normal(size=(3, 3)).astype(np.float32)
    made = jit(functools.partial(nest_gan.generate, MINI, params()))(random_BZ)
    assert np.abs(made).max() <= 1
    assert not np.allclose(made[0], made[1])


@pytest.mark.exhaustive
def test_each_player_learns_from_its_own_loss_only() -> None:
    """Against the two losses written out by themselves."""
    key = jax.random.key(3)
    keys = jax.random.split(key)
    random_BZ = jax.random.normal(keys[0], (4, MINI.latent))
    real = batch()["inputs"]
    near = real + nest_gan.NEAR * jax.random.normal(keys[1], real.shape)

    def score(discriminator: Any, images: Any) -> jax.Array:
        return nest.apply(MINI.discriminator, discriminator, images)

    def of_generator(generator: Any) -> jax.Array:
        made = nest_gan.generate(MINI, {"generator": generator}, random_BZ)
        return -jnp.mean(jax.nn.log_sigmoid(score(params()["discriminator"], made)))

    def of_discriminator(discriminator: Any) -> jax.Array:
        made = nest_gan.generate(MINI, params(), random_BZ)
        at_real, at_made = score(discriminator, real), score(discriminator, made)
        slope = (score(discriminator, near) - at_real) / nest_gan.NEAR
        wrong = -jax.nn.log_sigmoid(at_real) - jax.nn.log_sigmoid(-at_made)
        return jnp.mean(wrong) + MINI.penalty / 2 * jnp.mean(slope**2)

    value, found = jit(jax.value_and_grad(functools.partial(nest_gan.loss, MINI)))(
        params(), batch(), key
    )
    parts = {"generator": of_generator, "discriminator": of_discriminator}
    total = 0.0
    for name, part in parts.items():
        loss, expected = jit(jax.value_and_grad(part))(params()[name])
        total += float(loss)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
        jax.tree.map(close, found[name], expected)
    assert float(value) == pytest.approx(total, rel=1e-4)


@pytest.mark.exhaustive
def test_some_steps_change_the_images_and_leave_the_loss_finite() -> None:
    optimizer = make_optimizer(TrainConfig(warmup=1, b1=0.0))
    step = jit(make_step(functools.partial(nest_gan.loss, MINI), optimizer, seed=0))
    generate = jit(functools.partial(nest_gan.generate, MINI))
    random_BZ = np.random.default_rng(2).normal(size=(3, 3)).astype(np.float32)
    state = init_state(lambda key: params(), optimizer, 0)
    before = generate(state["params"], random_BZ)
    for _ in range(3):
        state, metrics = step(state, batch())
        assert np.isfinite(metrics["loss"])
    after = generate(state["params"], random_BZ)
    assert np.all(np.isfinite(after))
    assert np.abs(after - before).max() > 1e-4


# -------------------------------------------------------------------------------------- bad input


def test_random_numbers_of_another_count_are_refused() -> None:
    message = r"random numbers of shape \(2, 4\): each image takes 3; give \[batch, 3\]"
    with pytest.raises(ImageError, match=message):
        nest_gan.generate(MINI, params(), jnp.zeros((2, 4)))


@pytest.mark.parametrize(
    ("player", "changes", "message"),
    [
        ("discriminator", {"classes": 2}, "classes=2: the discriminator gives one score"),
        ("discriminator", {"channels": 3}, r"makes images of shape \(8, 8, 1\), but the discrimi"),
        ("generator", {"dims": (4, 6)}, "dims=6 of the generator's level 1 are no multiple of 4,"),
    ],
)
def test_players_that_do_not_fit_are_refused(
    player: str, changes: dict[str, Any], message: str
) -> None:
    other = dataclasses.replace(getattr(MINI, player), **changes)
    with pytest.raises(ImageError, match=message):
        dataclasses.replace(MINI, **{player: other})


# --------------------------------------------------------------------------------------- equality

MESHES = {  # one uneven, one with an axis of size 1
    "data": ("data=2", "data=3", "data=2,model=1"),
    "fsdp": ("data=2", "data=3", "data=4,model=1"),
    "tensor": ("data=2,model=2", "model=3", "data=1,model=4"),
    "spatial": ("rows=2,columns=2", "rows=3", "data=2,rows=2,columns=1"),
}
ON_DEVICES = (
    ("data", "data=8"), ("fsdp", "data=8"), ("tensor", "data=4,model=2"),
    ("spatial", "data=2,rows=2,columns=2"),
)  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("strategy", "mesh", "on"),
    [(strategy, mesh, "simulated") for strategy in MESHES for mesh in MESHES[strategy]]
    + [(strategy, mesh, "devices") for strategy, mesh in ON_DEVICES],
)
def test_a_partitioned_training_step_is_the_step(strategy: str, mesh: str, on: Any) -> None:
    """Loss, updated parameters and moments, which are sums of the gradients and their squares."""
    optimizer = make_optimizer(TrainConfig(warmup=1))
    step = make_step(functools.partial(nest_gan.loss, MINI), optimizer, seed=0)
    state = init_state(lambda key: params(), optimizer, 0)
    axes = tuple(part.partition("=")[0] for part in mesh.split(","))
    assert_equivalent(
        step, state, batch(8), mesh=mesh, rules=rules_for(strategy, axes),
        in_specs=(None, P("batch")), grad=False, on=on,
    )  # fmt: skip
