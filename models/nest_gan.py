"""A generator of images that is a NesT upside down, trained against a NesT (arXiv 2105.12723, 4.3).

From random numbers to one block, and level by level to an image: what aggregation makes of four
blocks, de-aggregation undoes. A pixel shuffle turns each position into four of a quarter of the
features, and a convolution, which crosses the borders of blocks, gives them the next level's dim.
The authors' code of this model is not out; the paper leaves the convolution, the discriminator and
the loss open, so that its 74.4M parameters at 64 x 64 cannot be matched. Here the discriminator is
a NesT of one class, and the loss the non-saturating one with a penalty on the discriminator's
slope at real images (R1, arXiv 1801.04406): measured along random directions, which in the mean
gives the squared gradient, and spares differentiating twice (arXiv 2501.08316).

Suffixes, annotations and strategies are those of `models/nest.py`; Z are the random numbers.
"""

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import truncated_normal

from gspmd.models import nest
from gspmd.models.nest import RULES, Blocks, rules_for
from gspmd.models.vision import Convolution, Dense, ImageError, LayerNorm

__all__ = [
    "CONFIGS", "RULES", "Config", "batch_shapes", "believe", "generate", "init", "loss", "rules_for"
]  # fmt: skip

Params = dict[str, Any]
"""`{"generator": ..., "discriminator": ...}`."""

NEAR = 0.01  # standard deviation of the noise that the penalty's slope is measured with

_INIT = truncated_normal(0.02)


@dataclasses.dataclass(frozen=True)
class Config:
    """Two NesTs that play against each other; the generator runs from its last level to the first.

    Raises ImageError where the two disagree about images, the discriminator has other than one
    class, or the features of a position do not split into those of four.
    """

    generator: nest.Config
    discriminator: nest.Config
    latent: int = 64  # random numbers that an image is made of
    penalty: float = 0.1  # times half the square of the slope

    def __post_init__(self) -> None:
        made, read = self.generator, self.discriminator
        if made.shape != read.shape:
            raise ImageError(
                f"the generator makes images of shape {made.shape}, but the discriminator reads "
                f"{read.shape}: rows, columns and channels must be the same."
            )
        if read.classes != 1:
            raise ImageError(f"classes={read.classes}: the discriminator gives one score.")
        for level, dim in enumerate(made.dims[1:], 1):
            if dim % 4:
                raise ImageError(
                    f"dims={dim} of the generator's level {level} are no multiple of 4, but each "
                    f"position becomes four; take {dim // 4 * 4 + 4}."
                )


CONFIGS: Mapping[str, Config] = MappingProxyType(
    {
        # 16 x 16 digits; trained on a CPU in minutes
        "digits": Config(
            generator=nest.CONFIGS["digits"],
            discriminator=dataclasses.replace(nest.CONFIGS["digits"], classes=1),
        ),
        # 64 x 64, blocks of 8 x 8: 1, 4, 16, 64 of them, as in the paper
        "imagenet": Config(
            generator=nest.Config(
                image=64, patch=1, block=8, dims=(128, 256, 512, 1024), layers=(2, 2, 2, 5),
                heads=(4, 8, 16, 32), drop_path=0.0,
            ),
            discriminator=nest.Config(
                image=64, patch=2, block=8, dims=(96, 192, 384), classes=1, drop_path=0.0
            ),
            latent=128,
        ),
    }
)  # fmt: skip


class Disaggregation(nnx.Module):
    """The plane of the level before: twice the rows and columns."""

    def __init__(self, config: nest.Config, level: int, rngs: nnx.Rngs):
        self.convolution = Convolution(rngs, config.dims[level] // 4, config.dims[level - 1], _INIT)

    def __call__(self, x_BYXM: jax.Array) -> jax.Array:
        return self.convolution(pixel_shuffle(x_BYXM, 2))


def pixel_shuffle(x_BYXM: jax.Array, times: int) -> jax.Array:
    """`times` as many rows and columns, of as many fewer features: those of a position in order."""
    B, Y, X, M = x_BYXM.shape
    x_BYXppM = x_BYXM.reshape(B, Y, X, times, times, M // times**2)
    return jnp.swapaxes(x_BYXppM, 2, 3).reshape(B, Y * times, X * times, M // times**2)


class Generator(nnx.Module):
    """Random numbers, one block of positions, the levels from the last to the first, pixels."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        sizes = config.generator
        self.sizes = sizes
        shape = (config.latent, sizes.block**2 * sizes.dims[-1])
        self.seed = Dense(rngs, shape, (None, "mlp"), _INIT)
        levels = reversed(range(len(sizes.dims)))
        self.blocks = nnx.List([Blocks(sizes, level, rngs) for level in levels])
        steps = reversed(range(1, len(sizes.dims)))
        self.steps = nnx.List([Disaggregation(sizes, level, rngs) for level in steps])
        self.norm = LayerNorm(sizes.dims[0])
        shape = (sizes.dims[0], sizes.patch**2 * sizes.channels)
        self.pixels = Dense(rngs, shape, ("embed", None), _INIT)

    def __call__(self, random_BZ: jax.Array) -> jax.Array:
        sizes = self.sizes
        side, dim = sizes.block, sizes.dims[-1]
        x_BYXM = self.seed(random_BZ.astype(sizes.dtype)).reshape(-1, side, side, dim)
        x_BYXM = self.blocks[0](x_BYXM)
        for step, blocks in zip(self.steps, self.blocks[1:], strict=True):
            x_BYXM = blocks(step(x_BYXM))
        x_BYXC = pixel_shuffle(self.pixels(self.norm(x_BYXM)), sizes.patch)
        return jnp.tanh(x_BYXC.astype(jnp.float32))


def init(config: Config, key: jax.Array) -> Params:
    """Fresh parameters of both as nested dicts of arrays."""
    keys = jax.random.split(key)
    generator = nnx.state(Generator(config, nnx.Rngs(keys[0])))
    return {
        "generator": nnx.to_pure_dict(generator),
        "discriminator": nest.init(config.discriminator, keys[1]),
    }


def generate(config: Config, params: Params, random_BZ: jax.Array) -> jax.Array:
    """Images BYXC in -1..1, made of normal random numbers, `config.latent` of them for each."""
    if random_BZ.ndim != 2 or random_BZ.shape[1] != config.latent:
        raise ImageError(
            f"random numbers of shape {random_BZ.shape}: each image takes {config.latent}; give "
            f"[batch, {config.latent}]."
        )
    model: Generator = nnx.merge(_structure(config), nnx.State(params["generator"]))
    return model(random_BZ)


def believe(config: Config, params: Params, images_BYXC: jax.Array) -> jax.Array:
    """How likely each image is a real one to the discriminator, B, from 0 to 1."""
    scores_B1 = nest.apply(config.discriminator, params["discriminator"], images_BYXC)
    return jax.nn.sigmoid(scores_B1[:, 0])


def batch_shapes(config: Config, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of `batch_size` images, as shapes; their labels are not looked at."""
    return nest.batch_shapes(config.discriminator, batch_size)


def loss(config: Config, params: Params, batch: nest.Batch, key: jax.Array) -> jax.Array:
    """The sum of both players' losses, whose gradient is to each player that of its own.

    The generator's is how unlike real ones its images look to the discriminator, held fixed; the
    discriminator's, how wrong it is about both kinds of images, with the penalty.
    """
    judge, keys = config.discriminator, jax.random.split(key)
    real_BYXC = jnp.asarray(batch["inputs"])
    B = len(real_BYXC)
    made_BYXC = generate(config, params, jax.random.normal(keys[0], (B, config.latent)))
    fixed = jax.lax.stop_gradient(params["discriminator"])
    generator = jnp.mean(jax.nn.softplus(-nest.apply(judge, fixed, made_BYXC)))

    near_BYXC = real_BYXC + NEAR * jax.random.normal(keys[1], real_BYXC.shape)
    images_BYXC = [real_BYXC, near_BYXC, jax.lax.stop_gradient(made_BYXC)]
    scores_B1 = nest.apply(judge, params["discriminator"], jnp.concatenate(images_BYXC))
    real_B1, near_B1, made_B1 = jnp.split(scores_B1, 3)
    wrong = jnp.mean(jax.nn.softplus(-real_B1)) + jnp.mean(jax.nn.softplus(made_B1))
    slope = jnp.mean(jnp.square((near_B1 - real_B1) / NEAR))
    return generator + wrong + config.penalty / 2 * slope


@functools.lru_cache
def _structure(config: Config) -> nnx.GraphDef[Generator]:
    """The generator without its arrays, which `nnx.merge` puts back together with parameters."""
    return nnx.graphdef(nnx.eval_shape(lambda: Generator(config, nnx.Rngs(0))))
