"""The Transformer: decoders, encoders, and both; dense, or with mixtures of experts.

Read it top to bottom: `Config`, the papers' sizes, the module, the functions that training and then
decoding call, the tables of strategies. It is made of `models/blocks.py` and `models/layers.py`. A
name's suffix spells its dims:

    B batch    S sequence (T where it is attended to)    M model dim    V vocabulary

Architecture (GSPMD section 5.1, arXiv 2105.04663; LaMDA; Lingvo's `DenseLm128B8x8`): RMSNorm before
each block, no bias vectors, GELU-gated MLP, a learned bias per bucket of relative positions as in
T5, and the embedding used again as the output matrix. Lingvo's parameter counts come out exactly.
GSPMD's mixture of 577B cannot be matched: its shape is not published, only that it is GShard's.

Experts that an axis does not divide are padded. ModelError is raised for a batch whose tokens do
not split into groups, an encoder without its source, and more tokens than positions were learned.

The model is written for one device. What makes it parallel are nine calls of `annotate`, in this
file and in those of its blocks, which name dims by their role; a table in `RULES` gives each role
the mesh axes that split it.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from gspmd.annotate import annotate
from gspmd.models import strategies
from gspmd.models.blocks import (
    ROLES,
    ModelError,
    RMSNorm,
    Sizes,
    cache_view,
    causal_view,
    cross_entropy,
    full_view,
    normal,
)
from gspmd.models.layers import Scene, make_layers, run_layers
from gspmd.models.strategies import Axis, Rules, table

Params = dict[str, Any]
"""Nested dicts of arrays: `params["layers"]["attention"]["wq"]` holds all layers, stacked."""

Batch = Mapping[str, jax.Array]
"""`{"inputs": tokens_BS, "targets": tokens_BS}`, a decoder's targets being inputs one position on.

"weights", if there, is what each target counts for in the loss: 0 for padding, or for what was not
masked. "source" are the tokens that an encoder reads for its decoder.
"""


@dataclasses.dataclass(frozen=True)
class Config(Sizes):
    """Sizes and choices of one Transformer. The defaults are those of the paper's dense family."""

    layers: int = 64
    experts: int = 0  # of every other layer, the first of each two; 0: no mixtures
    causal: bool = True  # a token sees those before it; else all, as in BERT
    encoder_layers: int = 0  # of an encoder, to which each layer attends as well
    encoder_experts: int = 0  # as `experts`, in the encoder
    label_smoothing: float = 0.0  # see `cross_entropy`
    z_loss: float = 0.0


_LAPTOP = Config(vocab=256, dtype=jnp.float32, remat=False)
_TINY = dataclasses.replace(
    _LAPTOP, layers=2, model_dim=64, hidden_dim=256, heads=4, head_dim=16, seq=64
)

CONFIGS: Mapping[str, Config] = MappingProxyType(
    {
        # bytes as tokens; trained on a CPU in minutes
        "tiny": _TINY,
        "small": dataclasses.replace(
            _LAPTOP, layers=4, model_dim=128, hidden_dim=512, heads=8, head_dim=16, seq=128
        ),
        # an encoder with experts, a dense decoder: see the strategy "nested"
        "tiny_nested": dataclasses.replace(_TINY, encoder_layers=2, encoder_experts=4),
        # GSPMD's Table 2; "128b" counts in units of 2^30 what LaMDA (arXiv 2201.08239) calls 137B
        "64b": Config(layers=32),
        "128b": Config(layers=64),
        "137b": Config(layers=64),
        "256b": Config(layers=128),
        "512b": Config(layers=256),
        "1t": Config(layers=128, model_dim=16_384, hidden_dim=131_072, heads=256),
        # Lingvo's DenseLm175B32x32
        "175b": Config(
            layers=96, model_dim=12_288, hidden_dim=49_152, heads=96, seq=2048, gated=False,
            positions="learned", logit_cap=50.0,
        ),
        # MLPerf v1.1's BERT of Google's open submission, Lingvo's MLPerfBertDense500B2K
        "bert_480b": Config(
            vocab=30_522, layers=64, model_dim=16_384, hidden_dim=131_072, heads=256, seq=512,
            activation="silu", multi_query=True, positions="learned", causal=False,
            label_smoothing=0.1,
        ),
        # GShard's MoE(2048E, 36L) (arXiv 2006.16668), half of the layers in each stack. Its experts
        # have 618.5B parameters; the vocabulary is a guess, and so no total is claimed.
        "gshard_600b": Config(
            vocab=64_000, layers=18, experts=2048, encoder_layers=18, encoder_experts=2048,
            model_dim=1024, hidden_dim=8192, heads=16, gated=False, activation="relu",
            dtype=jnp.float32,
        ),
    }
)  # fmt: skip


# ------------------------------------------------------------------------------------- the module


class Cache(NamedTuple):
    """What decoding remembers: keys and values of all layers, and how many tokens each row has."""

    layers: Any
    position_B: jax.Array


class Transformer(nnx.Module):
    """Token embedding, the layers (their weights stacked along L), a norm, logits."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        self.embedding = normal(config, rngs, (config.vocab, config.model_dim), 1.0)
        has_encoder = config.encoder_layers > 0
        self.layers = make_layers(
            config, rngs, config.layers, experts=config.experts, cross=has_encoder
        )
        self.final_norm = RMSNorm(config)
        if config.positions == "learned":
            self.positions = normal(config, rngs, (config.seq, config.model_dim), 1.0)
        if has_encoder:
            self.encoder = make_layers(
                config,
                rngs,
                config.encoder_layers,
                experts=config.encoder_experts,
                prefix="encoder_",
            )
            self.encoder_norm = RMSNorm(config)

    def __call__(
        self, tokens_BS: jax.Array, source_BT: jax.Array | None, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Logits BSV, and what routers add to the loss; None where there are none."""
        config, S = self.config, tokens_BS.shape[1]
        if not (config.dropout or config.experts or config.encoder_experts):
            key = None  # nothing is drawn
        w_VM = self.vocabulary()
        memory_BTM, encoder_loss = self.encode(w_VM, source_BT, key)
        view = causal_view(S, config.seq) if config.causal else full_view(S)
        x_BSM = self.embed(w_VM, tokens_BS)
        done = run_layers(config, self.layers, x_BSM, Scene(view, memory_BTM), key=key)
        losses = [x for x in (encoder_loss, done.loss) if x is not None]
        total = functools.reduce(operator.add, losses) if losses else None
        return self.logits(w_VM, done.x_BSM), total

    def prefill(
        self, tokens_BS: jax.Array, length_B: jax.Array, source_BT: jax.Array | None
    ) -> tuple[jax.Array, Cache]:
        """Logits BV of each row's next token, and the cache of the `length_B` tokens before it."""
        config, S = self.config, tokens_BS.shape[1]
        w_VM = self.vocabulary()
        memory_BTM, _ = self.encode(w_VM, source_BT, None)
        real_BS = jnp.arange(S) < length_B[:, None]
        view = causal_view(S, config.seq)
        scene = Scene(view, memory_BTM, slots=config.seq, real_BS=real_BS)
        done = run_layers(config, self.layers, self.embed(w_VM, tokens_BS), scene, keep=True)
        last_B11 = length_B[:, None, None] - 1
        x_B1M = jnp.take_along_axis(done.x_BSM, last_B11, axis=1)
        return self.logits(w_VM, x_B1M)[:, 0], Cache(done.cache, length_B)

    def decode(self, token_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Logits BV of the token after `token_B`, which follows those of the cache."""
        config, position_B = self.config, cache.position_B
        w_VM = self.vocabulary()
        scene = Scene(cache_view(position_B, config.seq), position_B=position_B)
        x_B1M = self.embed(w_VM, token_B[:, None], position_B[:, None])
        done = run_layers(config, self.layers, x_B1M, scene, cache=cache.layers, keep=True)
        return self.logits(w_VM, done.x_BSM)[:, 0], Cache(done.cache, position_B + 1)

    def encode(
        self, w_VM: jax.Array, source_BT: jax.Array | None, key: jax.Array | None
    ) -> tuple[jax.Array | None, jax.Array | None]:
        """What the decoder reads of the source, BTM, and what the encoder's routers add."""
        config = self.config
        if (source_BT is None) == (config.encoder_layers > 0):
            has = "has an encoder" if source_BT is None else "has no encoder"
            raise ModelError(f"this model {has}: {'give' if source_BT is None else 'drop'} source.")
        if source_BT is None:
            return None, None
        key = None if key is None else jax.random.fold_in(key, config.layers)
        scene = Scene(full_view(source_BT.shape[1]))
        x_BTM = self.embed(w_VM, source_BT)
        done = run_layers(config, self.encoder, x_BTM, scene, key=key)
        return self.encoder_norm(done.x_BSM), done.loss

    def vocabulary(self) -> jax.Array:
        """The embedding."""
        return annotate(self.embedding[...], P("vocab_table", "embed_table"))

    def embed(
        self, w_VM: jax.Array, tokens_BS: jax.Array, position_BS: jax.Array | None = None
    ) -> jax.Array:
        """The vectors of tokens, BSM, which stand at the positions 0, 1, ... or at those given."""
        x_BSM = w_VM[tokens_BS].astype(self.config.dtype)
        if self.config.positions == "relative":
            return x_BSM
        S = tokens_BS.shape[1]
        if self.config.seq < S:
            raise ModelError(
                f"{S} tokens, but seq={self.config.seq} positions were learned; shorten them."
            )
        at_M = self.positions[:S] if position_BS is None else self.positions[...][position_BS]
        return x_BSM + at_M.astype(self.config.dtype)

    def logits(self, w_VM: jax.Array, x_BSM: jax.Array) -> jax.Array:
        """The score of each token of the vocabulary, in float32."""
        x_BSM = self.final_norm(x_BSM) * self.config.model_dim**-0.5
        logits_BSV = jnp.einsum("BSM,VM->BSV", x_BSM, w_VM.astype(self.config.dtype))
        return annotate(logits_BSV, P("outer_batch", None, "vocab")).astype(jnp.float32)


# -------------------------------------------------------------------------------------- functions


def init(config: Config, key: jax.Array) -> Params:
    """Fresh parameters as nested dicts of arrays; `jax.eval_shape` of it allocates nothing."""
    return nnx.to_pure_dict(nnx.state(Transformer(config, nnx.Rngs(key))))


def apply(
    config: Config,
    params: Params,
    tokens_BS: jax.Array,
    source_BT: jax.Array | None = None,
    *,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Logits BSV in float32: at each position the scores of the next token."""
    return _module(config, params)(tokens_BS, source_BT, dropout_key)[0]


def loss(config: Config, params: Params, batch: Batch, key: jax.Array | None = None) -> jax.Array:
    """Mean cross entropy per token, in nats, and what routers add to it.

    The key is for dropout and for what routers draw; without one nothing is dropped or drawn.
    """
    logits_BSV, routers = _module(config, params)(batch["inputs"], batch.get("source"), key)
    value = cross_entropy(
        logits_BSV,
        batch["targets"],
        batch.get("weights"),
        smoothing=config.label_smoothing,
        z=config.z_loss,
    )
    return value if routers is None else value + routers


def evaluate(config: Config, params: Params, batch: Batch) -> dict[str, jax.Array]:
    """`cross_entropy`, without smoothing and z-loss; `routers`, what they add for each mixture.

    With `Top2` the latter is 0.01 where the load of the experts is even.
    """
    logits_BSV, routers = _module(config, params)(batch["inputs"], batch.get("source"), None)
    score = {"cross_entropy": cross_entropy(logits_BSV, batch["targets"], batch.get("weights"))}
    mixtures = config.layers // 2 * (config.experts > 0)
    mixtures += config.encoder_layers // 2 * (config.encoder_experts > 0)
    return score if routers is None else {**score, "routers": routers / mixtures}


@functools.lru_cache
def parameter_count(config: Config) -> int:
    """Parameters in all, by their shapes: nothing is allocated."""
    shapes = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def active_count(config: Config) -> int:
    """Parameters that a token meets: of the experts, those that it is sent to."""
    expert = config.model_dim * config.hidden_dim * (2 + config.expert_gated)
    met = config.router.experts_per_token
    stacks = (config.layers, config.experts), (config.encoder_layers, config.encoder_experts)
    idle = sum(layers // 2 * (experts - met) * expert for layers, experts in stacks if experts)
    return parameter_count(config) - round(idle)


def batch_shapes(config: Config, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of `batch_size` sequences, as shapes."""
    names = ("inputs", "targets", *(("source",) if config.encoder_layers else ()))
    tokens_BS = jax.ShapeDtypeStruct((batch_size, config.seq), jnp.int32)
    return dict.fromkeys(names, tokens_BS)


# --------------------------------------------------------------------------------------- decoding


def prefill(
    config: Config,
    params: Params,
    tokens_BS: jax.Array,
    length_B: jax.Array,
    source_BT: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
    """The scores BV of what comes after the first `length_B` tokens of each row, and the cache.

    Row b may have anything after `length_B[b]` tokens. The cache has room for the last `config.seq`
    tokens, so that decoding may go on for ever where positions are relative: a token sees itself
    and the `config.seq - 1` before it, as in training.
    """
    if not config.causal:
        raise ModelError("an encoder has no next token to decode: causal=False.")
    if tokens_BS.shape[1] > config.seq:
        raise ModelError(
            f"a prompt of {tokens_BS.shape[1]} tokens, but the cache has room for "
            f"seq={config.seq}; give its end."
        )
    return _module(config, params).prefill(tokens_BS, length_B, source_BT)


def decode(
    config: Config, params: Params, cache: Cache, token_B: jax.Array
) -> tuple[jax.Array, Cache]:
    """The scores BV of what comes after `token_B`, and the cache with it."""
    return _module(config, params).decode(token_B, cache)


def generate(
    config: Config,
    params: Params,
    prompt: ArrayLike,
    steps: int,
    key: jax.Array,
    temperature: float = 1.0,
) -> jax.Array:
    """The 1-D `prompt` and `steps` sampled tokens after it; temperature 0 takes the likeliest.

    Raises:
      ModelError: positions are learned, and run out.
    """
    prompt = jnp.asarray(prompt)
    recent = prompt[-config.seq :]
    if config.positions == "learned" and recent.size + steps > config.seq:
        raise ModelError(
            f"{recent.size} tokens and {steps} more, but seq={config.seq} positions were learned; "
            f"ask for {max(config.seq - recent.size, 0)} at most."
        )
    window_S = jnp.zeros(config.seq, prompt.dtype).at[: recent.size].set(recent)
    new = _sample(config, steps, params, window_S, recent.size, key, temperature)
    return jnp.concatenate([prompt, new])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sample(
    config: Config,
    steps: int,
    params: Params,
    window_S: jax.Array,
    filled: int,
    key: jax.Array,
    temperature: float,
) -> jax.Array:
    def step(carry: tuple[jax.Array, Cache], key: jax.Array):
        logits_BV, cache = carry
        drawn_B = jax.random.categorical(key, logits_BV / jnp.maximum(temperature, 1e-6))
        likeliest_B = jnp.argmax(logits_BV, axis=-1)
        token_B = jnp.where(temperature > 0, drawn_B, likeliest_B).astype(window_S.dtype)
        return decode(config, params, cache, token_B), token_B[0]

    carry = prefill(config, params, window_S[None], jnp.asarray([filled], jnp.int32))
    return jax.lax.scan(step, carry, jax.random.split(key, steps))[1]


def _module(config: Config, params: Params) -> Transformer:
    return nnx.merge(_structure(config), nnx.State(params))


@functools.lru_cache
def _structure(config: Config) -> nnx.GraphDef[Transformer]:
    """The module without its arrays, which `nnx.merge` puts back together with parameters."""
    return nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))


# --------------------------------------------------------------------------------- sharding tables

_MEGATRON = {"batch": "data", "heads": "model", "mlp": "model", "vocab": "model",
             "vocab_table": "model"}  # fmt: skip

RULES: Mapping[str, Rules] = MappingProxyType(
    {
        # Weights on every device. One all_reduce of all gradients per step.
        "data": table(ROLES, batch="data"),
        # Weights and optimizer split over the batch's axis, gathered where used: two all_gathers
        # (forward, backward) and one reduce_scatter of each weight per step (ZeRO-3).
        "fsdp": table(ROLES, batch="data", embed="data", embed_table="data"),
        # Megatron: two all_reduces of [B/data,S,M] over model per layer forward, two backward; each
        # device of a model group holds the whole residual stream.
        "tensor": table(ROLES, **_MEGATRON),
        # The paper's Table 1 on mesh (X, Y) = (data, model). Finalized: weights split both ways,
        # gathered over data; the residual stream split both ways, gathered and reduce_scattered
        # over model. Memory of weights and activations falls with data * model.
        "2d": table(
            ROLES, batch="data", act_model="model", embed="data", heads="model", mlp="model",
            vocab="model", embed_table="model",
        ),
        # Attempt 1: as "tensor", but weights at rest (and their update) split over data as well.
        # Saves the weights' memory; activations still fall with data only.
        "2d_attempt1": table(ROLES, **_MEGATRON, embed="data", embed_table="data"),
        # Attempt 2: weights stay where they are, split both ways, and the batch is whole: products
        # contract over data and their partial sums are reduced. Pays while the batch is small.
        "2d_attempt2": table(
            ROLES, act_model="data", embed="data", heads="model", mlp="model", vocab="model",
            vocab_table="model", embed_table="data",
        ),
        # As "tensor", with the residual stream split along S over model: norms and sums are shared
        # out, and each all_reduce is a reduce_scatter before them and an all_gather after.
        "sequence": table(ROLES, **_MEGATRON, act_seq="model"),
        # GShard: experts split over the batch's axis, all else on every device. Tokens travel to
        # their experts and back by all_to_all.
        "expert": table(ROLES, batch="data", expert="expert"),
        # The nested parallelism of GSPMD's announcement (research.google, December 2021) on mesh
        # (X, Y) = (data, model), without its pipeline. Y splits the vocabulary of embedding and
        # softmax, the experts of the encoder (whose tokens it splits as well), and the heads and
        # hidden dims of the decoder.
        "nested": table(
            ROLES, **_MEGATRON, encoder_batch=("data", "model"), encoder_heads=None,
            encoder_mlp=None, expert="model", expert_batch=("data", "model"), expert_mlp=None,
        ),
        # The same with it: X is data in embedding and softmax, and the stages of encoder and
        # decoder.
        "nested_pipeline": table(
            ROLES, **{**_MEGATRON, "batch": None}, stage="data", outer_batch="data",
            encoder_batch="model", encoder_heads=None, encoder_mlp=None, expert="model",
            expert_batch="model", expert_mlp=None,
        ),
    }
)  # fmt: skip


def rules_for(strategy: str, mesh_axes: Sequence[str]) -> dict[str, Axis]:
    """The table `RULES[strategy]` for a mesh with these axes: see `strategies.rules_for`."""
    return strategies.rules_for(RULES, strategy, mesh_axes)
