"""NesT: nested hierarchical Transformers for images (arXiv 2105.12723), from patches to classes.

An image is cut into square blocks of patches, and attention stays inside a block. From one level to
the next, four neighboring blocks become one: the plane of all blocks goes through a convolution, a
norm and a max-pool that halve its sides. At the last level one block is the whole image.

Read it top to bottom: `Config`, the modules from the smallest to the whole, then the functions that
a training step calls. A name's suffix spells its dims:

    B batch    Y X rows and columns of the plane    U V rows and columns of blocks
    S positions in a block    M model dim    L layers    C classes, or channels of an image

Sizes and parameter counts are those of google-research/nested-transformer. The CIFAR models share
keys and values among the heads there, as here; the paper's printed counts of CIFAR S and B (23.4M
and 90.1M) fit neither that nor separate ones.

The model is written for one device. What makes it parallel are the annotated kernels of
`vision.Dense` and `vision.Convolution`, and two calls of `annotate` below. Where an axis splits the
rows of the plane, the convolution and the pool of each aggregation fetch rows from the neighboring
device, and attention inside blocks fetches none. Rows that the axis does not divide are padded.
Images of another size, and levels that do not fit together, raise ImageError.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import truncated_normal
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from gspmd.annotate import annotate
from gspmd.models import strategies
from gspmd.models.strategies import Axis, Rules, table
from gspmd.models.vision import (
    MLP,
    Attention,
    Convolution,
    Dense,
    ImageError,
    LayerNorm,
    Patches,
    check_images,
    cross_entropy,
    image_batch,
)

Params = dict[str, Any]
"""Nested dicts of arrays: `params["levels"][0]["blocks"]["layers"]` holds layers, stacked."""

Batch = Mapping[str, jax.Array]
"""`{"inputs": images_BYXC, "targets": labels_B}`."""

_INIT = truncated_normal(0.02)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and choices of one NesT; the defaults are NesT-T. Level 0 is that of the patches.

    Raises ImageError where heads do not divide their dims, or the last level is not one block: the
    side of an image is patch * block * 2 ** (levels - 1).
    """

    image: int = 224  # rows and columns
    channels: int = 3
    patch: int = 4
    block: int = 14  # rows and columns of a block, at every level
    dims: tuple[int, ...] = (96, 192, 384)  # M of each level
    layers: tuple[int, ...] = (2, 2, 8)
    heads: tuple[int, ...] = (3, 6, 12)
    multi_query: bool = False  # one key and one value for all heads
    hidden: int = 4  # H / M of the MLP
    classes: int = 1000
    drop_path: float = 0.2  # of the last layer; rises linearly from 0 at the first
    smoothing: float = 0.1  # of the targets
    dtype: DTypeLike = jnp.bfloat16  # of matrix products; norms, softmax and loss are float32
    remat: bool = False  # keep only each layer's input for the backward pass

    def __post_init__(self) -> None:
        levels = len(self.dims)
        if not len(self.layers) == len(self.heads) == levels:
            raise ImageError(
                f"dims, layers and heads have one entry a level, got {levels}, "
                f"{len(self.layers)} and {len(self.heads)}."
            )
        for level, (dim, heads) in enumerate(zip(self.dims, self.heads, strict=True)):
            if dim % heads:
                raise ImageError(f"heads={heads} do not divide dims={dim} of level {level}.")
        side = self.patch * self.block * 2 ** (levels - 1)
        if self.image != side:
            raise ImageError(
                f"image={self.image}: {levels} levels of {self.block} x {self.block} blocks of "
                f"{self.patch} x {self.patch} patches make images of {side} x {side}; change one."
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, columns and channels of an image."""
        return self.image, self.image, self.channels

    def blocks(self, level: int) -> int:
        """Blocks along each side of the plane of `level`."""
        return 2 ** (len(self.dims) - 1 - level)


def _cifar(dim: int, heads: int) -> Config:
    return Config(
        image=32, patch=1, block=4, dims=(dim,) * 4, layers=(3,) * 4, heads=(heads,) * 4,
        multi_query=True, classes=10, drop_path=0.1,
    )  # fmt: skip


CONFIGS: Mapping[str, Config] = MappingProxyType(
    {
        # 16 x 16 digits; trained on a CPU in minutes
        "digits": Config(
            image=16, channels=1, patch=2, block=2, dims=(32, 48, 64), layers=(1, 1, 2),
            heads=(2, 3, 4), classes=10, drop_path=0.0, dtype=jnp.float32,
        ),
        "t": Config(),
        "s": Config(layers=(2, 2, 20), drop_path=0.3),
        "b": Config(
            dims=(128, 256, 512), layers=(2, 2, 20), heads=(4, 8, 16), drop_path=0.5
        ),
        "cifar-t": _cifar(192, 3),
        "cifar-s": _cifar(384, 6),
        "cifar-b": _cifar(768, 12),
    }
)  # fmt: skip


# ---------------------------------------------------------------------------------------- modules


class Layer(nnx.Module):
    """Attention, then the MLP; each reads the normalized stream of a block and adds to it."""

    def __init__(self, config: Config, level: int, rngs: nnx.Rngs):
        M = config.dims[level]
        self.attention_norm, self.mlp_norm = LayerNorm(M), LayerNorm(M)
        self.attention = Attention(rngs, M, config.heads[level], _INIT, config.multi_query)
        self.mlp = MLP(rngs, M, config.hidden * M, _INIT)

    def __call__(
        self, x_BSM: jax.Array, drop: jax.Array, key: jax.Array | None = None
    ) -> jax.Array:
        x_BSM += drop_path(self.attention(self.attention_norm(x_BSM)), drop, key, 0)
        return x_BSM + drop_path(self.mlp(self.mlp_norm(x_BSM)), drop, key, 1)


def drop_path(x_BSM: jax.Array, drop: jax.Array, key: jax.Array | None, block: int) -> jax.Array:
    """`x_BSM` with a share `drop` of its images zeroed, the rest scaled up; as it is, if no key."""
    if key is None:
        return x_BSM
    kept_B11 = jax.random.bernoulli(jax.random.fold_in(key, block), 1 - drop, (len(x_BSM), 1, 1))
    return jnp.where(kept_B11, x_BSM / (1 - drop).astype(x_BSM.dtype), 0)


class Aggregation(nnx.Module):
    """The plane of the next level: half the rows and columns, so that four blocks become one.

    Convolution and pool cross the borders of blocks: here, and only here, blocks hear of others.
    """

    def __init__(self, config: Config, level: int, rngs: nnx.Rngs):
        self.convolution = Convolution(rngs, config.dims[level - 1], config.dims[level], _INIT)
        self.norm = LayerNorm(config.dims[level])

    def __call__(self, x_BYXM: jax.Array) -> jax.Array:
        x_BYXM = self.norm(self.convolution(x_BYXM))
        return jax.lax.reduce_window(
            x_BYXM, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME"
        )


class Blocks(nnx.Module):
    """Encoder layers inside the blocks of a level's plane; all blocks share their weights."""

    def __init__(self, config: Config, level: int, rngs: nnx.Rngs):
        self.config, self.level = config, level
        shape = (config.blocks(level), config.blocks(level), config.block**2, config.dims[level])
        self.position = nnx.Param(_INIT(rngs.params(), shape, jnp.float32))
        keys_L = jax.random.split(rngs.params(), config.layers[level])
        self.layers = jax.vmap(functools.partial(_layer, config, level))(keys_L)

    def __call__(self, x_BYXM: jax.Array, key: jax.Array | None = None) -> jax.Array:
        config = self.config
        x_BYXM = annotate(x_BYXM, P("batch", "rows", "columns", None))
        # Where one block is the whole image, images are shared out in place of its rows.
        batch = "last_batch" if config.blocks(self.level) == 1 else "batch"
        x_BUVSM = to_blocks(x_BYXM, config.block)
        x_BUVSM = annotate(x_BUVSM, P(batch, *(P.UNCONSTRAINED,) * 4))
        x_BUVSM += self.position[...].astype(x_BUVSM.dtype)

        def step(x_BUVSM: jax.Array, layer_and_rest: tuple[Layer, jax.Array, jax.Array]):
            layer, drop, index = layer_and_rest
            now = None if key is None else jax.random.fold_in(key, index)
            of_block = functools.partial(layer, drop=drop, key=now)
            of_row = jax.vmap(of_block, in_axes=1, out_axes=1)
            return jax.vmap(of_row, in_axes=1, out_axes=1)(x_BUVSM), None

        if config.remat:
            # A loop by itself keeps the recomputation apart from the forward pass.
            step = jax.checkpoint(step, prevent_cse=False)
        index_L = sum(config.layers[: self.level]) + jnp.arange(config.layers[self.level])
        drop_L = config.drop_path * index_L / max(sum(config.layers) - 1, 1)
        x_BUVSM, _ = jax.lax.scan(step, x_BUVSM, (self.layers, drop_L, index_L))
        return to_plane(x_BUVSM, config.block)


def _layer(config: Config, level: int, key: jax.Array) -> Layer:
    return Layer(config, level, nnx.Rngs(key))


class Level(nnx.Module):
    """One level: patches or an aggregation, then the blocks."""

    def __init__(self, config: Config, level: int, rngs: nnx.Rngs):
        if level:
            self.enter = Aggregation(config, level, rngs)
        else:
            self.enter = Patches(rngs, config.patch, config.channels, config.dims[0], _INIT)
        self.blocks = Blocks(config, level, rngs)

    def __call__(self, x_BYXM: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return self.blocks(self.enter(x_BYXM), key)


class NesT(nnx.Module):
    """The levels, a norm, the mean over the plane, class scores."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        self.levels = nnx.List([Level(config, i, rngs) for i in range(len(config.dims))])
        self.norm = LayerNorm(config.dims[-1])
        self.head = Dense(rngs, (config.dims[-1], config.classes), ("embed", None), _INIT)

    def __call__(self, image_BYXC: jax.Array, key: jax.Array | None = None) -> jax.Array:
        x_BYXM = self.check(image_BYXC)
        for level in self.levels:
            x_BYXM = level(x_BYXM, None if self.config.drop_path == 0 else key)
        return self.classify(self.norm(x_BYXM))

    def check(self, image_BYXC: jax.Array) -> jax.Array:
        """What the first level reads; raises ImageError for images of another size."""
        config = self.config
        check_images(image_BYXC, config.shape)
        return image_BYXC.astype(config.dtype)

    def classify(self, x_BYXM: jax.Array) -> jax.Array:
        """Class scores BC in float32, from the last level's normalized plane."""
        return self.head(jnp.mean(x_BYXM.astype(jnp.float32), axis=(1, 2)))


def to_blocks(x_BYXM: jax.Array, side: int) -> jax.Array:
    """BUVSM: the plane cut into blocks of `side` x `side`."""
    B, Y, X, M = x_BYXM.shape
    x_BUyVxM = x_BYXM.reshape(B, Y // side, side, X // side, side, M)
    return jnp.swapaxes(x_BUyVxM, 2, 3).reshape(B, Y // side, X // side, side**2, M)


def to_plane(x_BUVSM: jax.Array, side: int) -> jax.Array:
    """BYXM: the plane that `to_blocks` cut."""
    B, U, V, _, M = x_BUVSM.shape
    x_BUVyxM = x_BUVSM.reshape(B, U, V, side, side, M)
    return jnp.swapaxes(x_BUVyxM, 2, 3).reshape(B, U * side, V * side, M)


# -------------------------------------------------------------------------------------- functions


def init(config: Config, key: jax.Array) -> Params:
    """Fresh parameters as nested dicts of arrays; `jax.eval_shape` of it allocates nothing."""
    return nnx.to_pure_dict(nnx.state(NesT(config, nnx.Rngs(key))))


def merge(config: Config, params: Params) -> NesT:
    """The model with these parameters, for what reads its levels one by one."""
    return nnx.merge(_structure(config), nnx.State(params))


def batch_shapes(config: Config, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of `batch_size` images and labels, as shapes."""
    return image_batch(batch_size, config.shape)


def apply(
    config: Config, params: Params, images_BYXC: jax.Array, *, key: jax.Array | None = None
) -> jax.Array:
    """Class scores BC in float32. With a key, layers are dropped as in training.

    Raises ImageError for images of another size than `config.image`.
    """
    return merge(config, params)(images_BYXC, key)


def loss(config: Config, params: Params, batch: Batch, key: jax.Array | None = None) -> jax.Array:
    """Mean cross entropy per image, in nats, of smoothed targets; without a key none is dropped."""
    logits_BC = apply(config, params, batch["inputs"], key=key)
    return cross_entropy(logits_BC, batch["targets"], config.smoothing)


@functools.lru_cache
def _structure(config: Config) -> nnx.GraphDef[NesT]:
    """The module without its arrays, which `nnx.merge` puts back together with parameters."""
    return nnx.graphdef(nnx.eval_shape(lambda: NesT(config, nnx.Rngs(0))))


# --------------------------------------------------------------------------------- sharding tables

ROLES = (
    "batch",  # B of every activation, but for
    "last_batch",  # B of the blocks of the last level
    "rows",  # Y of the plane
    "columns",  # X of the plane
    "embed",  # M of the weights
    "heads",  # N of the weights, and so of activations
    "mlp",  # H of the weights, and so of activations
)

RULES: Mapping[str, Rules] = MappingProxyType(
    {
        # Weights on every device. One all_reduce of all gradients per step.
        "data": table(ROLES, batch="data"),
        # Weights and optimizer split over the batch's axis, gathered where they are used.
        "fsdp": table(ROLES, batch="data", embed="data"),
        # Megatron: heads and hidden dims split; two sums of each layer's stream over model forward.
        "tensor": table(ROLES, batch="data", heads="model", mlp="model"),
        # The plane split by rows and columns. While a device has whole blocks, attention stays at
        # home, and aggregation fetches a few rows and columns of the neighbors. The last level's
        # one block is split by images instead, which costs an all_to_all. On a mesh with an axis
        # `model`, mixed with "tensor".
        "spatial": table(
            ROLES, batch="data", rows="rows", columns="columns", heads="model", mlp="model"
        ),
    }
)


def rules_for(strategy: str, mesh_axes: Sequence[str]) -> dict[str, Axis]:
    """The table `RULES[strategy]` for a mesh with these axes: see `strategies.rules_for`.

    What splits the rows and columns of the plane splits the images of the last level only.
    """
    rules = strategies.rules_for(RULES, strategy, mesh_axes)
    batch = tuple(a for a in rules["batch"] or () if a not in (rules["rows"], rules["columns"]))
    return rules | {"batch": batch or None}
