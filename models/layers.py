"""Layers of a Transformer, and the loop over a stack of them. Suffixes as in `models/blocks.py`."""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from gspmd import stages
from gspmd.annotate import annotate
from gspmd.models.blocks import KV, MLP, Attention, Mixture, ModelError, RMSNorm, Sizes, View
from gspmd.pipeline import pipeline


class Scene(NamedTuple):
    """What all layers of a stack see besides the residual stream.

    Args:
      view: of the sequence, or of the cache where there is `position_B`.
      memory_BTM: what a decoder reads of its encoder; None where the cache has it already.
      position_B: the place in its sequence of the one token that is decoded, its S being 1.
      slots: how many keys and values a cache has room for, where one is to be made.
      real_BS: which tokens are no padding; None: all.
    """

    view: View
    memory_BTM: jax.Array | None = None
    position_B: jax.Array | None = None
    slots: int | None = None
    real_BS: jax.Array | None = None


class Done(NamedTuple):
    """What layers leave: the residual stream, what routers add to the loss, keys and values."""

    x_BSM: jax.Array
    loss: jax.Array | None
    cache: Any


class Layer(nnx.Module):
    """Attention (in a decoder to the encoder as well), then an MLP or a mixture of experts.

    Each reads the normalized stream and adds to it.
    """

    def __init__(
        self,
        sizes: Sizes,
        rngs: nnx.Rngs,
        *,
        experts: int = 0,
        cross: bool = False,
        prefix: str = "",
    ):
        self.dropout, self.prefix = sizes.dropout, prefix
        relative = sizes.positions == "relative"
        self.attention_norm = RMSNorm(sizes)
        self.attention = Attention(sizes, rngs, relative=relative, prefix=prefix)
        self.has_cross, self.has_experts = cross, experts > 0
        if cross:
            self.cross_norm = RMSNorm(sizes)
            self.cross = Attention(sizes, rngs, relative=False, prefix=prefix)
        self.mlp_norm = RMSNorm(sizes)
        if experts:
            self.mixture = Mixture(sizes, rngs, experts)
        else:
            self.mlp = MLP(
                sizes, rngs, gated=sizes.gated, activation=sizes.activation, prefix=prefix
            )

    def __call__(
        self, x_BSM: jax.Array, scene: Scene, key: jax.Array | None = None, cache: Any = None
    ) -> Done:
        prefix = self.prefix
        x_BSM = annotate(x_BSM, P(prefix + "batch", prefix + "act_seq", prefix + "act_model"))
        normal_BSM = self.attention_norm(x_BSM)
        kv = self.attention.keys(normal_BSM)
        if scene.position_B is not None:
            kv = _written(cache["self"], kv, scene.position_B)
        kept = {"self": kv if scene.slots is None else _padded(kv, scene.slots)}
        x_BSM += self.drop(self.attention(normal_BSM, kv, scene.view), key, 0)

        if self.has_cross:
            memory_BTM = scene.memory_BTM
            kv = cache["cross"] if memory_BTM is None else self.cross.keys(memory_BTM)
            kept["cross"] = kv
            x_BSM += self.drop(self.cross(self.cross_norm(x_BSM), kv), key, 2)

        loss, normal_BSM = None, self.mlp_norm(x_BSM)
        if self.has_experts:
            route_key = None if key is None else jax.random.fold_in(key, 3)
            y_BSM, loss = self.mixture(normal_BSM, route_key, scene.real_BS)
        else:
            y_BSM = self.mlp(normal_BSM)
        return Done(x_BSM + self.drop(y_BSM, key, 1), loss, kept)

    def drop(self, x: jax.Array, key: jax.Array | None, block: int) -> jax.Array:
        """`x` with a share of its entries zeroed and the rest scaled up; `x` without a key."""
        if key is None or self.dropout == 0:
            return x
        keep = 1 - self.dropout
        kept = jax.random.bernoulli(jax.random.fold_in(key, block), keep, x.shape)
        return jnp.where(kept, x / keep, 0)


class Pair(nnx.Module):
    """A layer with a mixture of experts, then one with an MLP."""

    def __init__(
        self, sizes: Sizes, rngs: nnx.Rngs, *, experts: int, cross: bool = False, prefix: str = ""
    ):
        self.sparse = Layer(sizes, rngs, experts=experts, cross=cross, prefix=prefix)
        self.dense = Layer(sizes, rngs, cross=cross, prefix=prefix)

    def __call__(
        self, x_BSM: jax.Array, scene: Scene, key: jax.Array | None = None, cache: Any = None
    ) -> Done:
        keys = (None, None) if key is None else jax.random.split(key)
        caches = {"sparse": None, "dense": None} if cache is None else cache
        sparse = self.sparse(x_BSM, scene, keys[0], caches["sparse"])
        dense = self.dense(sparse.x_BSM, scene, keys[1], caches["dense"])
        return Done(dense.x_BSM, sparse.loss, {"sparse": sparse.cache, "dense": dense.cache})


def _written(cache: KV, new: KV, position_B: jax.Array) -> KV:
    """`cache` with the one token of `new` in the slot of its position."""
    slots = cache.k_BTND.shape[1]
    here_BT11 = (jnp.arange(slots) == position_B[:, None] % slots)[..., None, None]
    return KV(*(jnp.where(here_BT11, x, old) for old, x in zip(cache, new, strict=True)))


def _padded(kv: KV, slots: int) -> KV:
    """`kv` with empty slots behind, so that there are `slots`."""
    empty = slots - kv.k_BTND.shape[1]
    return KV(*(jnp.pad(x, ((0, 0), (0, empty), (0, 0), (0, 0))) for x in kv))


# ------------------------------------------------------------------------------------- the stack


def make_layers(
    sizes: Sizes,
    rngs: nnx.Rngs,
    count: int,
    *,
    experts: int = 0,
    cross: bool = False,
    prefix: str = "",
) -> Layer | Pair:
    """`count` layers as one module, their weights stacked along L; with experts, in pairs.

    Raises:
      ModelError: an odd number of layers with experts.
    """
    if experts and count % 2:
        raise ModelError(
            f"layers={count} with {experts} experts: every other layer has experts, so that "
            f"layers come in pairs; make them {count + 1}."
        )
    make = functools.partial(_layer, sizes, experts=experts, cross=cross, prefix=prefix)
    return jax.vmap(make)(jax.random.split(rngs.params(), count // 2 if experts else count))


def _layer(sizes: Sizes, key: jax.Array, *, experts: int, cross: bool, prefix: str) -> Layer | Pair:
    kind = Pair if experts else Layer
    return kind(sizes, nnx.Rngs(key), experts=experts, cross=cross, prefix=prefix)


def run_layers(
    sizes: Sizes,
    layers: Layer | Pair,
    x_BSM: jax.Array,
    scene: Scene,
    *,
    key: jax.Array | None = None,
    cache: Any = None,
    keep: bool = False,
) -> Done:
    """What the stacked `layers` leave: by one loop, or by a copy of its body for each of them.

    Losses are added up; keys and values are stacked along L, where they are to be kept. Where the
    sizes say so they are a pipeline instead, though not in decoding.
    """
    if sizes.stages > 1 and cache is None and not keep:
        return _piped(sizes, layers, x_BSM, scene, key)
    count = jax.tree.leaves(layers)[0].shape[0]
    sparse = isinstance(layers, Pair)

    def step(carry: tuple[jax.Array, jax.Array | None], turn: tuple[Layer | Pair, Any, Any]):
        (x_BSM, total), (layer, index, cache) = carry, turn
        layer_key = None if key is None else jax.random.fold_in(key, index)
        done = layer(x_BSM, scene, layer_key, cache)
        # A sum that is carried: what devices owe of it is paid once, after the loop.
        total = done.loss if total is None or done.loss is None else total + done.loss
        return (done.x_BSM, total), done.cache if keep else None

    if sizes.remat:
        # A loop by itself keeps the recomputation apart from the forward pass.
        step = jax.checkpoint(step, prevent_cse=not sizes.scan)
    carry = x_BSM, jnp.zeros(()) if sparse else None
    turns = (layers, None if key is None else jnp.arange(count), cache)
    if sizes.scan:
        (x_BSM, total), kept = jax.lax.scan(step, carry, turns)
        return Done(x_BSM, total, kept)
    each: list[Any] = []
    for i in range(count):
        carry, kept = step(carry, jax.tree.map(operator.itemgetter(i), turns))
        each.append(kept)
    return Done(*carry, jax.tree.map(lambda *xs: jnp.stack(xs), *each))


def _piped(
    sizes: Sizes, layers: Layer | Pair, x_BSM: jax.Array, scene: Scene, key: jax.Array | None
) -> Done:
    """What the layers leave, dealt out to the stages of a pipeline.

    Tokens are routed together within a microbatch, and the routers' loss is the mean over the rows
    of these; what is drawn differs from what is without a pipeline.
    """
    rows, count = x_BSM.shape[0], jax.tree.leaves(layers)[0].shape[0]
    sparse, own = isinstance(layers, Pair), (sizes.stages,) + (sizes.repeats,) * (sizes.repeats > 1)
    micro = sizes.microbatches or next(n for n in range(4 * sizes.stages, 0, -1) if rows % n == 0)

    def real(i: jax.Array) -> jax.Array | None:
        """The tokens of microbatch i that are not there once more, see `to_microbatches`."""
        row_B = jnp.arange(-(-rows // micro)) * micro + i
        there_BS = jnp.broadcast_to(row_B[:, None] < rows, (row_B.size, x_BSM.shape[1]))
        return there_BS if rows % micro else None

    def layer(turn: Any, x_BSM: jax.Array, side: Any, *total: jax.Array) -> Any:
        (layer, index), (memory_BTM, i) = turn, side
        layer_key = None
        if key is not None:
            layer_key = jax.random.fold_in(jax.random.fold_in(key, index), i)
        # Its name is for the backward pass, which has what goes into each layer, and no more.
        x_BSM = checkpoint_name(x_BSM, "layer")
        done = layer(x_BSM, scene._replace(memory_BTM=memory_BTM, real_BS=real(i)), layer_key)
        return (done.x_BSM, total[0] + done.loss) if sparse else done.x_BSM

    memory_BTM = scene.memory_BTM
    memory = None if memory_BTM is None else stages.to_microbatches(memory_BTM, micro)
    depth = -(-count // (sizes.stages * sizes.repeats))
    made = pipeline(
        stages.run_layers(layer, keeps=int(sparse)),
        stages.stack_stages((layers, jnp.arange(count)), sizes.stages, sizes.repeats, "stage"),
        stages.to_microbatches(x_BSM, micro),
        stages=sizes.stages,
        schedule="circular" if sizes.repeats > 1 else "gpipe",
        repeats=sizes.repeats,
        remat=jax.checkpoint_policies.save_only_these_names("layer") if sizes.remat else False,
        sides=(memory, jnp.arange(micro)),
        state=jnp.zeros((*own, depth)) if sparse else None,
    )
    # A microbatch's loss is a mean over its rows, to which those that are no tokens add nothing.
    y, loss = (made[0], jnp.sum(made[1]) * -(-rows // micro) / rows) if sparse else (made, None)
    return Done(stages.from_microbatches(y, rows), loss, None)
