"""A decoder-only Transformer: the dense family of the GSPMD paper, and small ones for a laptop.

Read it top to bottom: `Config`, the modules from the smallest to the whole, then the functions that
a training step calls. A name's suffix spells its dims:

    B batch    S sequence (T where it is attended to)    M model dim    H hidden dim of the MLP
    N heads    D head dim    V vocabulary    L layers    K buckets of relative positions

Architecture (GSPMD section 5.1, arXiv 2105.04663; LaMDA; Lingvo's `DenseLm128B8x8`): RMSNorm before
each block, no bias vectors, GELU-gated MLP, a learned bias per bucket of relative positions as in
T5, and the embedding used again as the output matrix. Lingvo's parameter counts come out exactly.

The model is written for one device. What makes it parallel are nine calls of `annotate`, which
name dims by their role; a table in `RULES` gives each role the mesh axes that split it.
"""

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike, DTypeLike

from gspmd.annotate import annotate
from gspmd.errors import SpecError

Params = dict[str, Any]
"""Nested dicts of arrays: `params["layers"]["attention"]["wq"]` holds all layers, stacked."""

Batch = Mapping[str, jax.Array]
"""`{"inputs": tokens_BS, "targets": tokens_BS}`, targets being inputs one position on."""

BUCKETS, MAX_DISTANCE = 32, 128  # of relative positions, as in T5


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and choices of one Transformer. The defaults are those of the paper's dense family."""

    vocab: int = 32_000
    layers: int = 64
    model_dim: int = 8192
    hidden_dim: int = 65_536
    heads: int = 128
    head_dim: int = 128
    seq: int = 1024
    gated: bool = True  # gelu(x @ wi_gate) * (x @ wi), else gelu(x @ wi)
    dropout: float = 0.0  # on what each block adds to the residual stream
    dtype: DTypeLike = jnp.bfloat16  # of matrix products; norms, softmax and loss are float32
    param_dtype: DTypeLike = jnp.float32
    remat: bool = True  # keep only each layer's input for the backward pass
    scan: bool = True  # one loop over the layers, else one copy of the layer after another


_LAPTOP = Config(vocab=256, dtype=jnp.float32, remat=False)

CONFIGS: Mapping[str, Config] = MappingProxyType(
    {
        # bytes as tokens; trained on a CPU in minutes
        "tiny": dataclasses.replace(
            _LAPTOP, layers=2, model_dim=64, hidden_dim=256, heads=4, head_dim=16, seq=64
        ),
        "small": dataclasses.replace(
            _LAPTOP, layers=4, model_dim=128, hidden_dim=512, heads=8, head_dim=16, seq=128
        ),
        # the paper's Table 2; "128b" counts in units of 2^30 what LaMDA calls 137B
        "64b": Config(layers=32),
        "128b": Config(layers=64),
        "137b": Config(layers=64),
        "256b": Config(layers=128),
        "512b": Config(layers=256),
        "1t": Config(layers=128, model_dim=16_384, hidden_dim=131_072, heads=256),
    }
)


# ---------------------------------------------------------------------------------------- modules


class RMSNorm(nnx.Module):
    """x / rms(x), times a learned scale per entry of M."""

    def __init__(self, config: Config):
        self.scale = nnx.Param(jnp.ones(config.model_dim, config.param_dtype))

    def __call__(self, x_BSM: jax.Array) -> jax.Array:
        x32_BSM = x_BSM.astype(jnp.float32)
        mean_square_BS1 = jnp.mean(jnp.square(x32_BSM), axis=-1, keepdims=True)
        normal_BSM = x32_BSM * jax.lax.rsqrt(mean_square_BS1 + 1e-6)
        return (normal_BSM * self.scale[...]).astype(x_BSM.dtype)


class Attention(nnx.Module):
    """Causal self-attention. 1/sqrt(D) is folded into the initial scale of `wq`, as in T5."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        M, N, D = config.model_dim, config.heads, config.head_dim
        self.config = config
        self.wq = _normal(config, rngs, (M, N, D), (M * D) ** -0.5)
        self.wk = _normal(config, rngs, (M, N, D), M**-0.5)
        self.wv = _normal(config, rngs, (M, N, D), M**-0.5)
        self.wo = _normal(config, rngs, (N, D, M), (N * D) ** -0.5)
        self.bias = _normal(config, rngs, (N, BUCKETS), (N * BUCKETS) ** -0.5)

    def __call__(self, x_BSM: jax.Array, bucket_ST: jax.Array) -> jax.Array:
        def project(w: nnx.Param[jax.Array]) -> jax.Array:
            w_MND = annotate(w[...], P("embed", "heads", None)).astype(self.config.dtype)
            y_BSND = jnp.einsum("BSM,MND->BSND", x_BSM, w_MND)
            return annotate(y_BSND, P("batch", None, "heads", None))

        q_BSND, k_BTND, v_BTND = project(self.wq), project(self.wk), project(self.wv)

        score_BNST = jnp.einsum("BSND,BTND->BNST", q_BSND, k_BTND).astype(jnp.float32)
        # A sum, not a select over BNST: the loop would keep that mask broadcast to BNST.
        causal_ST = jnp.where(jnp.tri(*bucket_ST.shape, dtype=bool), 0.0, -1e30)
        score_BNST += self.bias[...].astype(jnp.float32)[:, bucket_ST] + causal_ST
        weight_BNST = jax.nn.softmax(score_BNST, axis=-1).astype(self.config.dtype)
        y_BSND = jnp.einsum("BNST,BTND->BSND", weight_BNST, v_BTND)

        w_NDM = annotate(self.wo[...], P("heads", None, "embed")).astype(self.config.dtype)
        return jnp.einsum("BSND,NDM->BSM", y_BSND, w_NDM)


class MLP(nnx.Module):
    """Two matrices with a GELU between them, or three where it is gated."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        M, H = config.model_dim, config.hidden_dim
        self.config = config
        self.wi = _normal(config, rngs, (M, H), M**-0.5)
        if config.gated:
            self.wi_gate = _normal(config, rngs, (M, H), M**-0.5)
        self.wo = _normal(config, rngs, (H, M), H**-0.5)

    def __call__(self, x_BSM: jax.Array) -> jax.Array:
        def project(w: nnx.Param[jax.Array]) -> jax.Array:
            w_MH = annotate(w[...], P("embed", "mlp")).astype(self.config.dtype)
            return jnp.einsum("BSM,MH->BSH", x_BSM, w_MH)

        h_BSH = project(self.wi)
        if self.config.gated:
            h_BSH = jax.nn.gelu(project(self.wi_gate)) * h_BSH
        else:
            h_BSH = jax.nn.gelu(h_BSH)
        h_BSH = annotate(h_BSH, P("batch", None, "mlp"))

        w_HM = annotate(self.wo[...], P("mlp", "embed")).astype(self.config.dtype)
        return jnp.einsum("BSH,HM->BSM", h_BSH, w_HM)


class Layer(nnx.Module):
    """Attention, then the MLP; each reads the normalized stream and adds to it."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.dropout = config.dropout
        self.attention_norm, self.attention = RMSNorm(config), Attention(config, rngs)
        self.mlp_norm, self.mlp = RMSNorm(config), MLP(config, rngs)

    def __call__(
        self, x_BSM: jax.Array, bucket_ST: jax.Array, key: jax.Array | None = None
    ) -> jax.Array:
        x_BSM = annotate(x_BSM, P("batch", "act_seq", "act_model"))
        y_BSM = self.attention(self.attention_norm(x_BSM), bucket_ST)
        x_BSM += self.drop(y_BSM, key, 0)
        y_BSM = self.mlp(self.mlp_norm(x_BSM))
        return x_BSM + self.drop(y_BSM, key, 1)

    def drop(self, x: jax.Array, key: jax.Array | None, block: int) -> jax.Array:
        """`x` with a share of its entries zeroed and the rest scaled up; `x` without a key."""
        if key is None:
            return x
        keep = 1 - self.dropout
        kept = jax.random.bernoulli(jax.random.fold_in(key, block), keep, x.shape)
        return jnp.where(kept, x / keep, 0)


class Transformer(nnx.Module):
    """Token embedding, the layers (their weights stacked along L), a norm, logits."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        self.embedding = _normal(config, rngs, (config.vocab, config.model_dim), 1.0)
        keys_L = jax.random.split(rngs.params(), config.layers)
        self.layers = jax.vmap(functools.partial(_layer, config))(keys_L)
        self.final_norm = RMSNorm(config)

    def __call__(self, tokens_BS: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        config = self.config
        w_VM = annotate(self.embedding[...], P("vocab_table", "embed_table"))
        x_BSM = w_VM[tokens_BS].astype(config.dtype)
        x_BSM = self.run_layers(x_BSM, None if config.dropout == 0 else dropout_key)
        x_BSM = self.final_norm(x_BSM) * config.model_dim**-0.5
        logits_BSV = jnp.einsum("BSM,VM->BSV", x_BSM, w_VM.astype(config.dtype))
        return annotate(logits_BSV, P("batch", None, "vocab")).astype(jnp.float32)

    def run_layers(self, x_BSM: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        """What the last layer adds up to: one loop, or `config.layers` copies of its body."""
        bucket_ST = position_buckets(x_BSM.shape[1])

        def step(x_BSM: jax.Array, layer_and_index: tuple[Layer, Any]):
            layer, index = layer_and_index
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
            return layer(x_BSM, bucket_ST, key), None

        if self.config.remat:
            # A loop by itself keeps the recomputation apart from the forward pass.
            step = jax.checkpoint(step, prevent_cse=not self.config.scan)
        indices = None if dropout_key is None else jnp.arange(self.config.layers)
        layers = (self.layers, indices)
        if self.config.scan:
            return jax.lax.scan(step, x_BSM, layers)[0]
        for i in range(self.config.layers):
            x_BSM, _ = step(x_BSM, jax.tree.map(operator.itemgetter(i), layers))
        return x_BSM


def _layer(config: Config, key: jax.Array) -> Layer:
    return Layer(config, nnx.Rngs(key))


def position_buckets(length: int) -> jax.Array:
    """T5's bucket for each pair (query, key): exact up to 15 back, then 16 on a logarithmic scale.

    Keys that lie ahead fall into bucket 0; the causal mask hides them.
    """
    position_S = jnp.arange(length)
    back_ST = jnp.maximum(position_S[:, None] - position_S, 0)
    exact = BUCKETS // 2
    octaves = jnp.log(jnp.maximum(back_ST, 1) / exact) / jnp.log(MAX_DISTANCE / exact)
    far_ST = exact + (octaves * exact).astype(jnp.int32)
    return jnp.where(back_ST < exact, back_ST, jnp.minimum(far_ST, BUCKETS - 1))


def _normal(
    config: Config, rngs: nnx.Rngs, shape: tuple[int, ...], std: float
) -> nnx.Param[jax.Array]:
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, config.param_dtype))


# -------------------------------------------------------------------------------------- functions


def init(config: Config, key: jax.Array) -> Params:
    """Fresh parameters as nested dicts of arrays; `jax.eval_shape` of it allocates nothing."""
    return nnx.to_pure_dict(nnx.state(Transformer(config, nnx.Rngs(key))))


def apply(
    config: Config, params: Params, tokens_BS: jax.Array, *, dropout_key: jax.Array | None = None
) -> jax.Array:
    """Logits BSV in float32: at each position the scores of the next token."""
    model: Transformer = nnx.merge(_structure(config), nnx.State(params))
    return model(tokens_BS, dropout_key)


def loss(
    config: Config, params: Params, batch: Batch, dropout_key: jax.Array | None = None
) -> jax.Array:
    """Mean cross entropy per token, in nats. Without a key nothing is dropped."""
    logits_BSV = apply(config, params, batch["inputs"], dropout_key=dropout_key)
    # A product with a one-hot, not an index: it splits along V like any other sum.
    target_BSV = jax.nn.one_hot(batch["targets"], config.vocab, dtype=jnp.float32)
    score_BS = jnp.sum(logits_BSV * target_BSV, axis=-1)
    return jnp.mean(jax.nn.logsumexp(logits_BSV, axis=-1) - score_BS)


def generate(
    config: Config,
    params: Params,
    prompt: ArrayLike,
    steps: int,
    key: jax.Array,
    temperature: float = 1.0,
) -> jax.Array:
    """The 1-D `prompt` and `steps` sampled tokens after it; temperature 0 takes the likeliest.

    Every token runs the model over a window of the last `config.seq` tokens: slow and simple.
    """
    prompt = jnp.asarray(prompt)
    recent = prompt[-config.seq :]
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
    def step(carry: tuple[jax.Array, jax.Array], key: jax.Array):
        window_S, filled = carry
        logits_V = apply(config, params, window_S[None])[0, filled - 1]
        drawn = jax.random.categorical(key, logits_V / jnp.maximum(temperature, 1e-6))
        token = jnp.where(temperature > 0, drawn, jnp.argmax(logits_V)).astype(window_S.dtype)
        full = filled == config.seq
        window_S = jnp.where(full, jnp.roll(window_S, -1), window_S)
        filled = jnp.where(full, filled, filled + 1)
        return (window_S.at[filled - 1].set(token), filled), token

    carry = (window_S, jnp.asarray(filled, jnp.int32))
    return jax.lax.scan(step, carry, jax.random.split(key, steps))[1]


@functools.lru_cache
def _structure(config: Config) -> nnx.GraphDef[Transformer]:
    """The module without its arrays, which `nnx.merge` puts back together with parameters."""
    return nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))


# --------------------------------------------------------------------------------- sharding tables

Rules = Mapping[str, str | tuple[str, ...] | None]
"""Logical name of a dim -> the mesh axes that split it, outermost first; None leaves it whole."""

_WHOLE: Rules = MappingProxyType(
    dict.fromkeys(
        (
            "batch",  # B of every activation
            "act_seq",  # S of the residual stream
            "act_model",  # M of the residual stream
            "embed",  # M of the weights
            "heads",  # N of weights and activations
            "mlp",  # H of weights and activations
            "vocab",  # V of the logits
            "vocab_table",  # V of the embedding
            "embed_table",  # M of the embedding
        )
    )
)


def _table(**axes: str) -> Rules:
    return MappingProxyType({**_WHOLE, **axes})


_MEGATRON = _table(batch="data", heads="model", mlp="model", vocab="model", vocab_table="model")

RULES: Mapping[str, Rules] = MappingProxyType(
    {
        # Weights on every device. One all_reduce of all gradients per step.
        "data": _table(batch="data"),
        # Weights and optimizer split over the batch's axis, gathered where used: two all_gathers
        # (forward, backward) and one reduce_scatter of each weight per step (ZeRO-3).
        "fsdp": _table(batch="data", embed="data", embed_table="data"),
        # Megatron: two all_reduces of [B/data,S,M] over model per layer forward, two backward; each
        # device of a model group holds the whole residual stream.
        "tensor": _MEGATRON,
        # The paper's Table 1 on mesh (X, Y) = (data, model). Finalized: weights split both ways,
        # gathered over data; the residual stream split both ways, gathered and reduce_scattered
        # over model. Memory of weights and activations falls with data * model.
        "2d": _table(
            batch="data", act_model="model", embed="data", heads="model", mlp="model",
            vocab="model", embed_table="model",
        ),
        # Attempt 1: as "tensor", but weights at rest (and their update) split over data as well.
        # Saves the weights' memory; activations still fall with data only.
        "2d_attempt1": MappingProxyType({**_MEGATRON, "embed": "data", "embed_table": "data"}),
        # Attempt 2: weights stay where they are, split both ways, and the batch is whole: products
        # contract over data and their partial sums are reduced. Pays while the batch is small.
        "2d_attempt2": _table(
            act_model="data", embed="data", heads="model", mlp="model", vocab="model",
            vocab_table="model", embed_table="data",
        ),
        # As "tensor", with the residual stream split along S over model: norms and sums are shared
        # out, and each all_reduce is a reduce_scatter before them and an all_gather after.
        "sequence": MappingProxyType({**_MEGATRON, "act_seq": "model"}),
    }
)  # fmt: skip


def rules_for(strategy: str, mesh_axes: Sequence[str]) -> dict[str, str | tuple[str, ...] | None]:
    """The table `RULES[strategy]` for a mesh with these axes, outermost first.

    Axes that the mesh lacks are dropped. Every axis other than `model` splits the batch. An axis
    `fsdp`, where the mesh has one, splits the weights in place of `data`, which then holds copies.
    """
    if strategy not in RULES:
        raise SpecError(f"no strategy {strategy!r}: choose one of {', '.join(RULES)}.")
    batch_axes = tuple(axis for axis in mesh_axes if axis != "model")
    weight_axis = "fsdp" if "fsdp" in mesh_axes else "data"

    def resolve(name: str, axis: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if name == "batch" and axis is not None:
            return batch_axes or None
        axis = weight_axis if axis == "data" else axis
        return axis if axis in mesh_axes else None

    return {name: resolve(name, axis) for name, axis in RULES[strategy].items()}
