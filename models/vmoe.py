"""V-MoE: Vision Transformers whose MLPs are mixtures of experts (arXiv 2106.05974).

A Vision Transformer cuts an image into patches, puts a learned token before them, and runs encoder
layers over the sequence. In some layers, a router sends each token to the k experts that it likes
best of E, while these have places; what experts do not process passes by them in the residual
stream. Groups of 8 images are routed together. k, the places and who goes first (Batch Priority
Routing) are no parameters: `apply` takes another router than the model was trained with.

Read it top to bottom: `Config`, the modules, then the functions that a training step calls. A
name's suffix spells its dims:

    B batch    S sequence: the class token and the patches    M model dim    L layers    C classes
    G groups, S their tokens    E experts    C places of an expert    Y X rows, columns of an image

Sizes are those of google-research/vmoe, whose released checkpoints have the very same parameter
counts; so do the paper's table of dense and "every 2" models, and those of its "last n" models
that the table prints. Of JFT's classes there are 18,291, of JFT-3B's 29,593.

The model is written for one device. What makes it parallel are the annotated kernels of
`vision.Dense`, which those of the experts are, too, and one call of `annotate` below. Experts that
an axis does not divide are padded: five on four devices take the tokens that they would on one.
Images of another size, and a batch that does not split into groups, raise ImageError; a router
without places, or with more choices than experts, raises RoutingError.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import lecun_normal, normal, xavier_uniform, zeros
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from gspmd.annotate import annotate
from gspmd.models import strategies
from gspmd.models.routing import ROUTERS, Router, Routing, combine, dispatch
from gspmd.models.strategies import Axis, Rules, table
from gspmd.models.vision import (
    MLP,
    Attention,
    Dense,
    ImageError,
    LayerNorm,
    Patches,
    check_images,
    image_batch,
    sigmoid_cross_entropy,
)

T = TypeVar("T")

Params = dict[str, Any]
"""Nested dicts of arrays: `params["pairs"]["sparse"]` holds all layers with experts, stacked."""

Batch = Mapping[str, jax.Array]
"""`{"inputs": images_BYXC, "targets": labels_B}`."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and choices of one V-MoE; the defaults are B/16, every other layer with experts.

    Raises ImageError where patches do not fill the image, heads do not divide `model_dim`, or
    layers are fewer than twice the `sparse` ones: every other layer, counted from the last.
    """

    image: int = 224  # rows and columns
    channels: int = 3
    patch: int = 16
    layers: int = 12
    model_dim: int = 768
    hidden_dim: int = 3072
    heads: int = 12
    sparse: int = 6  # layers with experts: half of all ("every 2"), fewer ("last n"), or none
    experts: int = 32
    router: Router = ROUTERS["vmoe"]
    group: int = 8  # images whose tokens are routed together
    pre_logits: bool = True  # one more dense layer, with tanh, before the head
    classes: int = 18_291
    dtype: DTypeLike = jnp.bfloat16  # of matrix products; norms, softmax and loss are float32
    remat: bool = False  # keep only each layer's input for the backward pass

    def __post_init__(self) -> None:
        if self.image % self.patch:
            raise ImageError(
                f"image={self.image} is no multiple of patch={self.patch}; take "
                f"{self.image // self.patch * self.patch}."
            )
        if self.model_dim % self.heads:
            raise ImageError(f"heads={self.heads} do not divide model_dim={self.model_dim}.")
        if 2 * self.sparse > self.layers:
            raise ImageError(
                f"sparse={self.sparse} of {self.layers} layers: every other layer at most has "
                f"experts; take {self.layers // 2} or fewer."
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, columns and channels of an image."""
        return self.image, self.image, self.channels

    @property
    def tokens(self) -> int:
        """The class token and the patches."""
        return (self.image // self.patch) ** 2 + 1


_S = Config(layers=8, model_dim=512, hidden_dim=2048, heads=8, patch=32, sparse=4)
_B = Config()
_L = Config(layers=24, model_dim=1024, hidden_dim=4096, heads=16, sparse=12)
_H = Config(layers=32, model_dim=1280, hidden_dim=5120, heads=16, patch=14, sparse=16)
_SIZES = {
    "s32": _S,
    "b32": dataclasses.replace(_B, patch=32),
    "b16": _B,
    "l32": dataclasses.replace(_L, patch=32),
    "l16": _L,
    "h14": _H,
}
_PLACES = {"dense": lambda layers: 0, "every2": lambda layers: layers // 2,
           "last2": lambda layers: 2, "last5": lambda layers: 5}  # fmt: skip

CONFIGS: Mapping[str, Config] = MappingProxyType(
    {
        # 16 x 16 digits; trained on a CPU in minutes
        "digits": Config(
            image=16, channels=1, patch=4, layers=4, model_dim=48, hidden_dim=96, heads=3,
            sparse=2, experts=8, pre_logits=False, classes=10, dtype=jnp.float32,
        ),
        # the paper's, for JFT-300M: "s32-dense", "s32-every2", ..., "h14-last5"
        **{
            f"{size}-{place}": dataclasses.replace(config, sparse=count(config.layers))
            for size, config in _SIZES.items()
            for place, count in _PLACES.items()
            if 2 * count(config.layers) <= config.layers
        },
        "15b": Config(
            layers=48, model_dim=1408, hidden_dim=6400, heads=16, patch=14, sparse=24,
            pre_logits=False, classes=29_593,
        ),
        # released checkpoints, of ImageNet's 1,000 and 21,843 classes
        "s32-last2-in1k": dataclasses.replace(_S, sparse=2, experts=8, classes=1000),
        "b16-every2-in21k": dataclasses.replace(
            _B, experts=8, pre_logits=False, classes=21_843
        ),
        "b16-every2-in1k-384": dataclasses.replace(
            _B, image=384, experts=8, pre_logits=False, classes=1000
        ),
    }
)  # fmt: skip


# ---------------------------------------------------------------------------------------- modules


class Mixture(nnx.Module):
    """A router, and an MLP for each expert, their weights stacked along E.

    The experts of a layer start out alike, as the paper's do; the router tells them apart.
    """

    def __init__(self, config: Config, rngs: nnx.Rngs):
        E, M = config.experts, config.model_dim
        self.config = config
        self.router = nnx.Param(lecun_normal()(rngs.params(), (M, E), jnp.float32))
        expert = MLP(rngs, M, config.hidden_dim, xavier_uniform(), prefix="expert_")
        self.experts = jax.tree.map(lambda x: jnp.broadcast_to(x, (E, *x.shape)), expert)

    def __call__(self, x_BSM: jax.Array, key: jax.Array | None) -> tuple[jax.Array, Routing]:
        """What the experts make of each token, zeros where none has it; and who has which."""
        x_GSM = to_groups(x_BSM, self.config.group)
        logits_GSE = jnp.einsum("GSM,ME->GSE", x_GSM.astype(jnp.float32), self.router[...])
        routing = self.config.router.route(logits_GSE, key, dtype=x_GSM.dtype)
        each = jax.vmap(MLP.__call__, spmd_axis_name="expert")
        y_EGCM = each(self.experts, dispatch(routing, x_GSM))
        y_GSM = combine(routing, y_EGCM)
        return y_GSM.reshape(x_BSM.shape), routing


def to_groups(x_BSM: jax.Array, images: int) -> jax.Array:
    """The tokens of each `images` together, GSM.

    Raises ImageError if the batch does not split into groups.
    """
    B, S, M = x_BSM.shape
    if B % images:
        raise ImageError(
            f"a batch of {B} images does not split into groups of {images}; make it "
            f"{-(-B // images) * images}, or replace `group` in the configuration."
        )
    return x_BSM.reshape(B // images, images * S, M)


class Layer(nnx.Module):
    """Attention, then an MLP or a mixture; each reads the normalized stream and adds to it."""

    def __init__(self, config: Config, rngs: nnx.Rngs, sparse: bool):
        M, start = config.model_dim, xavier_uniform()
        self.sparse = sparse
        self.attention_norm, self.mlp_norm = LayerNorm(M), LayerNorm(M)
        self.attention = Attention(rngs, M, config.heads, start)
        if sparse:
            self.mixture = Mixture(config, rngs)
        else:
            self.mlp = MLP(rngs, M, config.hidden_dim, start)

    def __call__(
        self, x_BSM: jax.Array, key: jax.Array | None = None
    ) -> tuple[jax.Array, Routing | None]:
        x_BSM = annotate(x_BSM, P("batch", P.UNCONSTRAINED, P.UNCONSTRAINED))
        x_BSM += self.attention(self.attention_norm(x_BSM))
        normal_BSM = self.mlp_norm(x_BSM)
        if not self.sparse:
            return x_BSM + self.mlp(normal_BSM), None
        y_BSM, routing = self.mixture(normal_BSM, key)
        return x_BSM + y_BSM, routing


class Pair(nnx.Module):
    """A layer with an MLP, then one with experts."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.dense, self.sparse = Layer(config, rngs, False), Layer(config, rngs, True)

    def __call__(
        self, x_BSM: jax.Array, key: jax.Array | None = None
    ) -> tuple[jax.Array, Routing | None]:
        x_BSM, _ = self.dense(x_BSM)
        return self.sparse(x_BSM, key)


class VMoE(nnx.Module):
    """Patches and class token, dense layers, pairs of a dense and a sparse one, class scores."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        M = config.model_dim
        self.config = config
        self.patches = Patches(rngs, config.patch, config.channels, M, lecun_normal())
        self.token = nnx.Param(jnp.zeros(M))
        self.position = nnx.Param(normal(0.02)(rngs.params(), (config.tokens, M), jnp.float32))
        self.dense = _stack(_dense, config, rngs, config.layers - 2 * config.sparse)
        self.pairs = _stack(_pair, config, rngs, config.sparse)
        self.norm = LayerNorm(M)
        if config.pre_logits:
            self.pre_logits = Dense(rngs, (M, M), ("embed", None), xavier_uniform())
        shape, names = (M, config.classes), ("embed", None)
        self.head = Dense(rngs, shape, names, zeros, bias=-math.log(config.classes))

    def __call__(
        self, image_BYXC: jax.Array, key: jax.Array | None, see: Callable[[Routing], T]
    ) -> tuple[jax.Array, T | None]:
        """Class scores BC in float32, and what `see` returns for each sparse layer, stacked."""
        config = self.config
        check_images(image_BYXC, config.shape)
        patch_BYXM = self.patches(image_BYXC.astype(config.dtype))
        B, *_, M = patch_BYXM.shape
        token_B1M = jnp.broadcast_to(self.token[...].astype(config.dtype), (B, 1, M))
        x_BSM = jnp.concatenate([token_B1M, patch_BYXM.reshape(B, -1, M)], axis=1)
        x_BSM += self.position[...].astype(config.dtype)

        x_BSM, _ = self.run(self.dense, x_BSM, None, see)
        x_BSM, seen = self.run(self.pairs, x_BSM, key, see)
        x_BM = self.norm(x_BSM)[:, 0]
        if config.pre_logits:
            x_BM = jnp.tanh(self.pre_logits(x_BM))
        return self.head(x_BM.astype(jnp.float32)), seen

    def run(
        self,
        layers: Layer | Pair | None,
        x_BSM: jax.Array,
        key: jax.Array | None,
        see: Callable[[Routing], T],
    ) -> tuple[jax.Array, T | None]:
        """What the last of the stacked `layers` adds up to: one loop over them."""
        if layers is None:
            return x_BSM, None

        def step(x_BSM: jax.Array, layer_and_index: tuple[Layer | Pair, jax.Array]):
            layer, index = layer_and_index
            x_BSM, routing = layer(x_BSM, None if key is None else jax.random.fold_in(key, index))
            return x_BSM, None if routing is None else see(routing)

        if self.config.remat:
            # A loop by itself keeps the recomputation apart from the forward pass.
            step = jax.checkpoint(step, prevent_cse=False)
        count = jax.tree.leaves(layers)[0].shape[0]
        return jax.lax.scan(step, x_BSM, (layers, jnp.arange(count)))


def _dense(config: Config, key: jax.Array) -> Layer:
    return Layer(config, nnx.Rngs(key), False)


def _pair(config: Config, key: jax.Array) -> Pair:
    return Pair(config, nnx.Rngs(key))


def _stack(make: Callable[..., T], config: Config, rngs: nnx.Rngs, count: int) -> T | None:
    """`count` of what `make` makes, as one, its weights stacked along L; None of none."""
    if count == 0:
        return None
    return jax.vmap(functools.partial(make, config))(jax.random.split(rngs.params(), count))


# -------------------------------------------------------------------------------------- functions


def init(config: Config, key: jax.Array) -> Params:
    """Fresh parameters as nested dicts of arrays; `jax.eval_shape` of it allocates nothing."""
    return nnx.to_pure_dict(nnx.state(VMoE(config, nnx.Rngs(key))))


def batch_shapes(config: Config, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of `batch_size` images and labels, as shapes."""
    return image_batch(batch_size, config.shape)


def apply(
    config: Config, params: Params, images_BYXC: jax.Array, *, router: Router | None = None
) -> jax.Array:
    """Class scores BC in float32; without noise, as the routing of a trained model is.

    Args:
      router: in place of the one that the model was trained with. With fewer places, or a lower k,
        inference is cheaper: `dataclasses.replace(config.router, capacity_factor=0.5,
        batch_priority=True)`.

    Raises:
      ImageError: images of another size than `config.image`, or a batch that does not split into
        groups.
      RoutingError: a router without places, or with more choices than there are experts.
    """
    return _forward(config, params, images_BYXC, lambda routing: None, router=router)[0]


def loss(config: Config, params: Params, batch: Batch, key: jax.Array | None = None) -> jax.Array:
    """Sigmoid cross entropy per image, in nats, and the routers' losses. Without a key no noise."""
    logits_BC, seen = _forward(config, params, batch["inputs"], lambda r: r.loss, key=key)
    balance = 0.0 if seen is None else jnp.sum(seen)
    return sigmoid_cross_entropy(logits_BC, batch["targets"]) + balance


def taken(
    config: Config, params: Params, images_BYXC: jax.Array, *, router: Router | None = None
) -> jax.Array:
    """LBSE: whether expert e of each sparse layer has token s of an image; as `apply` routes."""
    B, S, E = len(images_BYXC), config.tokens, config.experts

    def see(routing: Routing) -> jax.Array:
        return jnp.any(routing.dispatch_GSEC, axis=-1).reshape(B, S, E)

    seen = _forward(config, params, images_BYXC, see, router=router)[1]
    return jnp.zeros((0, B, S, E), bool) if seen is None else seen


def _forward(
    config: Config,
    params: Params,
    images_BYXC: jax.Array,
    see: Callable[[Routing], T],
    *,
    router: Router | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, T | None]:
    if router is not None:
        config = dataclasses.replace(config, router=router)
    model: VMoE = nnx.merge(_structure(config), nnx.State(params))
    return model(images_BYXC, key, see)


@functools.lru_cache
def _structure(config: Config) -> nnx.GraphDef[VMoE]:
    """The module without its arrays, which `nnx.merge` puts back together with parameters."""
    return nnx.graphdef(nnx.eval_shape(lambda: VMoE(config, nnx.Rngs(0))))


# --------------------------------------------------------------------------------- sharding tables

ROLES = (
    "batch",  # B of every activation, and G of the groups
    "embed",  # M of the weights
    "heads",  # N of the weights, and so of activations
    "mlp",  # H of the weights, and so of activations
    "expert",  # E of the experts' weights, and so of what is sent to them
    "expert_embed",  # M of the experts' weights
    "expert_mlp",  # H of the experts' weights
)

RULES: Mapping[str, Rules] = MappingProxyType(
    {
        # Weights on every device. One all_reduce of all gradients per step.
        "data": table(ROLES, batch="data"),
        # The paper's: experts split over an axis of the batch, all else on every device. Tokens
        # travel to their experts and back by all_to_all.
        "expert": table(ROLES, batch="data", expert="expert"),
        # Each expert, as all else, split over model as well: Megatron.
        "expert_tensor": table(
            ROLES, batch="data", heads="model", mlp="model", expert="expert"
        ),
        # The other weights are split over the batch's axes where they rest.
        "expert_fsdp": table(ROLES, batch="data", embed="data", expert="expert"),
    }
)  # fmt: skip


def rules_for(strategy: str, mesh_axes: Sequence[str]) -> dict[str, Axis]:
    """The table `RULES[strategy]` for a mesh with these axes: see `strategies.rules_for`.

    An axis "expert" of the mesh splits the experts, and with all other axes but "model" the batch;
    without one "data" does both.
    """
    return strategies.rules_for(RULES, strategy, mesh_axes)
