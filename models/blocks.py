"""What the Transformers are made of: norm, attention, MLP, mixture of experts.

A name's suffix spells its dims:

    B batch    S sequence (T where it is attended to)    M model dim    H hidden dim of the MLP
    N heads    D head dim    V vocabulary    L layers    E experts    G groups    C capacity

Blocks are written for one device. What makes them parallel are calls of `annotate`, which name dims
by their role, one of `ROLES`; with those of the layer and of the model there are nine. A block of
an encoder or of an expert has roles of its own, which begin with its `prefix`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from gspmd.annotate import annotate
from gspmd.errors import GspmdError
from gspmd.models.routing import ROUTERS, Router, Routing, combine, dispatch

BUCKETS, MAX_DISTANCE = 32, 128  # of relative positions, as in T5

Activation = Literal["gelu", "relu", "silu"]
ACTIVATIONS: Mapping[Activation, Callable[[jax.Array], jax.Array]] = MappingProxyType(
    {"gelu": jax.nn.gelu, "relu": jax.nn.relu, "silu": jax.nn.silu}
)


PLAIN_ROLES = (
    "batch",  # B of every activation
    "act_seq",  # S of the residual stream
    "act_model",  # M of the residual stream
    "embed",  # M of the weights
    "heads",  # N of weights and activations
    "mlp",  # H of weights and activations
)
ROLES = (
    *PLAIN_ROLES,
    "stage",  # of a pipeline, in which layers run side by side
    "outer_batch",  # B outside of the layers, where the devices of all stages share it
    "vocab",  # V of the logits
    "vocab_table",  # V of the embedding
    "embed_table",  # M of the embedding
    "expert",  # E of the experts' weights, and of what is sent to them
    "expert_batch",  # G of what is sent to the experts
    "expert_embed",  # M of the experts' weights
    "expert_mlp",  # H of the experts' weights and activations
    *("encoder_" + role for role in PLAIN_ROLES),  # the same in an encoder
)


class ModelError(GspmdError, ValueError):
    """A configuration or a batch does not fit the model."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes and choices of the blocks. The defaults are those of the GSPMD paper's dense family."""

    vocab: int = 32_000
    model_dim: int = 8192
    hidden_dim: int = 65_536
    heads: int = 128
    head_dim: int = 128
    seq: int = 1024  # tokens of a sequence; a token sees itself and the `seq - 1` before it
    gated: bool = True  # act(x @ wi_gate) * (x @ wi), else act(x @ wi)
    activation: Activation = "gelu"
    multi_query: bool = False  # one key and value head, read by all query heads
    positions: Literal["relative", "learned"] = "relative"  # a bias per bucket, or added vectors
    logit_cap: float | None = None  # attention's scores as cap * tanh(score / cap)
    router: Router = ROUTERS["top2"]
    group_size: int | None = None  # tokens that are routed together; None: a sequence
    expert_gated: bool = False
    expert_activation: Activation = "relu"
    dropout: float = 0.0  # on what each block adds to the residual stream
    dtype: DTypeLike = jnp.bfloat16  # of matrix products; norms, softmax and loss are float32
    param_dtype: DTypeLike = jnp.float32
    stages: int = 1  # of the pipeline through which the layers run in training; 1: there is none
    microbatches: int | None = None  # of a pipeline; None: four for each stage, if rows allow
    repeats: int = 1  # how often a microbatch goes round the stages
    remat: bool = True  # keep only each layer's input for the backward pass
    scan: bool = True  # one loop over the layers, else one copy of the layer after another


class RMSNorm(nnx.Module):
    """x / rms(x), times a learned scale per entry of M."""

    def __init__(self, sizes: Sizes):
        self.scale = nnx.Param(jnp.ones(sizes.model_dim, sizes.param_dtype))

    def __call__(self, x_BSM: jax.Array) -> jax.Array:
        x32_BSM = x_BSM.astype(jnp.float32)
        mean_square_BS1 = jnp.mean(jnp.square(x32_BSM), axis=-1, keepdims=True)
        normal_BSM = x32_BSM * jax.lax.rsqrt(mean_square_BS1 + 1e-6)
        return (normal_BSM * self.scale[...]).astype(x_BSM.dtype)


# -------------------------------------------------------------------------------------- attention


class View(NamedTuple):
    """What each query sees: the bucket of each key's distance, and 0, or -1e30 where it is hidden.

    Both are [S, T], or [B, S, T] where rows of the batch differ.
    """

    bucket: jax.Array
    mask: jax.Array


class KV(NamedTuple):
    """Keys and values, [B, T, N, D]; as a cache of all layers, [L, B, T, N, D]."""

    k_BTND: jax.Array
    v_BTND: jax.Array


def causal_view(length: int, window: int) -> View:
    """Each position sees itself and the `window - 1` before it."""
    position_S = jnp.arange(length)
    back_ST = position_S[:, None] - position_S
    return _view(jnp.maximum(back_ST, 0), (back_ST >= 0) & (back_ST < window))


def full_view(length: int) -> View:
    """Each position sees all; those ahead have the upper half of the buckets, as in T5."""
    position_S = jnp.arange(length)
    back_ST = position_S[:, None] - position_S
    half = BUCKETS // 2
    bucket_ST = position_bucket(jnp.abs(back_ST), half) + half * (back_ST < 0)
    return View(bucket_ST, jnp.zeros(back_ST.shape, jnp.float32))


def cache_view(position_B: jax.Array, slots: int) -> View:
    """What a token at `position_B` sees of a cache, whose slot t has the latest t + n * `slots`."""
    back_BST = ((position_B[:, None] - jnp.arange(slots)) % slots)[:, None, :]
    return _view(back_BST, back_BST <= position_B[:, None, None])


def _view(back: jax.Array, visible: jax.Array) -> View:
    return View(position_bucket(back), jnp.where(visible, 0.0, -1e30))


def position_bucket(back: jax.Array, buckets: int = BUCKETS) -> jax.Array:
    """T5's bucket of a distance: exact below half of them, then on a logarithmic scale."""
    exact = buckets // 2
    octaves = jnp.log(jnp.maximum(back, 1) / exact) / math.log(MAX_DISTANCE / exact)
    far = exact + (octaves * exact).astype(jnp.int32)
    return jnp.where(back < exact, back, jnp.minimum(far, buckets - 1))


class Attention(nnx.Module):
    """Attention. 1/sqrt(D) is folded into the initial scale of `wq`, as in T5."""

    def __init__(self, sizes: Sizes, rngs: nnx.Rngs, *, relative: bool, prefix: str = ""):
        M, N, D = sizes.model_dim, sizes.heads, sizes.head_dim
        K = 1 if sizes.multi_query else N
        self.sizes, self.prefix = sizes, prefix
        self.wq = normal(sizes, rngs, (M, N, D), (M * D) ** -0.5)
        self.wk = normal(sizes, rngs, (M, K, D), M**-0.5)
        self.wv = normal(sizes, rngs, (M, K, D), M**-0.5)
        self.wo = normal(sizes, rngs, (N, D, M), (N * D) ** -0.5)
        if relative:
            self.bias = normal(sizes, rngs, (N, BUCKETS), (N * BUCKETS) ** -0.5)

    def keys(self, x_BTM: jax.Array) -> KV:
        """Keys and values of what may be attended to."""
        return KV(self._project(self.wk, x_BTM), self._project(self.wv, x_BTM))

    def __call__(self, x_BSM: jax.Array, kv: KV, view: View | None = None) -> jax.Array:
        """What each position gathers from `kv`; all of it, without bias, where there is no view."""
        q_BSND = self._project(self.wq, x_BSM)
        if self.sizes.multi_query:
            score_BNST = jnp.einsum("BSND,BTD->BNST", q_BSND, kv.k_BTND[:, :, 0])
        else:
            score_BNST = jnp.einsum("BSND,BTND->BNST", q_BSND, kv.k_BTND)
        score_BNST = score_BNST.astype(jnp.float32)
        if (cap := self.sizes.logit_cap) is not None:
            score_BNST = cap * jnp.tanh(score_BNST / cap)
        if view is not None:
            # A sum, not a select over BNST: the loop would keep that mask broadcast to BNST.
            score_BNST += self._bias(view)
        weight_BNST = jax.nn.softmax(score_BNST, axis=-1).astype(self.sizes.dtype)
        if self.sizes.multi_query:
            y_BSND = jnp.einsum("BNST,BTD->BSND", weight_BNST, kv.v_BTND[:, :, 0])
        else:
            y_BSND = jnp.einsum("BNST,BTND->BSND", weight_BNST, kv.v_BTND)

        spec = P(self.prefix + "heads", None, self.prefix + "embed")
        w_NDM = annotate(self.wo[...], spec).astype(self.sizes.dtype)
        return jnp.einsum("BSND,NDM->BSM", y_BSND, w_NDM)

    def _project(self, w: nnx.Param[jax.Array], x_BSM: jax.Array) -> jax.Array:
        heads = self.prefix + "heads" if w.shape[1] > 1 else None
        w_MND = annotate(w[...], P(self.prefix + "embed", heads, None)).astype(self.sizes.dtype)
        y_BSND = jnp.einsum("BSM,MND->BSND", x_BSM, w_MND)
        return annotate(y_BSND, P(self.prefix + "batch", None, heads, None))

    def _bias(self, view: View) -> jax.Array:
        mask = view.mask if view.mask.ndim == 2 else view.mask[:, None]
        if self.sizes.positions == "learned":
            return mask
        table_NK = self.bias[...].astype(jnp.float32)
        return jnp.moveaxis(table_NK[:, view.bucket], 0, -3) + mask


# --------------------------------------------------------------------------------- feed-forward


class MLP(nnx.Module):
    """Two matrices with an activation between them, or three where it is gated."""

    def __init__(
        self,
        sizes: Sizes,
        rngs: nnx.Rngs,
        *,
        gated: bool,
        activation: Activation,
        prefix: str = "",
    ):
        M, H = sizes.model_dim, sizes.hidden_dim
        self.sizes, self.prefix = sizes, prefix
        self.gated, self.activation = gated, ACTIVATIONS[activation]
        self.wi = normal(sizes, rngs, (M, H), M**-0.5)
        if gated:
            self.wi_gate = normal(sizes, rngs, (M, H), M**-0.5)
        self.wo = normal(sizes, rngs, (H, M), H**-0.5)

    def __call__(self, x_BSM: jax.Array) -> jax.Array:
        prefix, act = self.prefix, self.activation

        def project(w: nnx.Param[jax.Array]) -> jax.Array:
            w_MH = annotate(w[...], P(prefix + "embed", prefix + "mlp")).astype(self.sizes.dtype)
            return jnp.einsum("BSM,MH->BSH", x_BSM, w_MH)

        h_BSH = project(self.wi)
        h_BSH = act(project(self.wi_gate)) * h_BSH if self.gated else act(h_BSH)
        h_BSH = annotate(h_BSH, P(prefix + "batch", None, prefix + "mlp"))

        w_HM = annotate(self.wo[...], P(prefix + "mlp", prefix + "embed")).astype(self.sizes.dtype)
        return jnp.einsum("BSH,HM->BSM", h_BSH, w_HM)


class Mixture(nnx.Module):
    """A mixture of experts: a router, and an MLP for each expert, their weights stacked along E.

    An expert is an MLP that was mapped over a dim of the role "expert": its roles are those of an
    MLP with that dim in front.
    """

    def __init__(self, sizes: Sizes, rngs: nnx.Rngs, experts: int):
        self.sizes = sizes
        self.router = normal(sizes, rngs, (sizes.model_dim, experts), sizes.model_dim**-0.5)
        keys_E = jax.random.split(rngs.params(), experts)
        self.experts = jax.vmap(functools.partial(_expert, sizes))(keys_E)

    def __call__(
        self, x_BSM: jax.Array, key: jax.Array | None = None, real_BS: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The tokens' outputs, and what the router adds to the loss.

        Where "expert" takes an axis of "batch", tokens reach their experts by one all_to_all, and
        their outputs come home by another.
        """
        x_GSM, routing = self.route(x_BSM, key, real_BS)
        sent_EGCM = dispatch(routing, x_GSM)
        each = jax.vmap(MLP.__call__, spmd_axis_name="expert")
        y_GSM = combine(routing, each(self.experts, sent_EGCM))
        return y_GSM.reshape(x_BSM.shape), routing.loss

    def route(
        self, x_BSM: jax.Array, key: jax.Array | None = None, real_BS: jax.Array | None = None
    ) -> tuple[jax.Array, Routing]:
        """The tokens in groups, and where they go; those that are not `real_BS` are padding."""
        G, S = groups(self.sizes, *x_BSM.shape[:2])
        x_GSM = x_BSM.reshape(G, S, -1)
        mask_GS = None if real_BS is None else real_BS.reshape(G, S)
        logits_GSE = jnp.einsum("GSM,ME->GSE", x_GSM.astype(jnp.float32), self.router[...])
        return x_GSM, self.sizes.router.route(logits_GSE, key, mask_GS, dtype=x_GSM.dtype)


def _expert(sizes: Sizes, key: jax.Array) -> MLP:
    return MLP(
        sizes,
        nnx.Rngs(key),
        gated=sizes.expert_gated,
        activation=sizes.expert_activation,
        prefix="expert_",
    )


def groups(sizes: Sizes, batch: int, seq: int) -> tuple[int, int]:
    """How many groups a batch of tokens has, and the tokens of each; a small batch is one group.

    Raises:
      ModelError: the batch does not split into groups.
    """
    tokens, size = batch * seq, min(sizes.group_size or sizes.seq, batch * seq)
    if tokens % size:
        raise ModelError(
            f"a batch of {batch} x {seq} = {tokens} tokens does not split into groups of "
            f"{size}; change the batch, or group_size, so that it does."
        )
    return tokens // size, size


# ------------------------------------------------------------------------- parameters and the loss


def normal(
    sizes: Sizes, rngs: nnx.Rngs, shape: tuple[int, ...], std: float
) -> nnx.Param[jax.Array]:
    """A parameter drawn with this standard deviation."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, sizes.param_dtype))


def cross_entropy(
    logits_BSV: jax.Array,
    target_BS: jax.Array,
    weight_BS: jax.Array | None = None,
    *,
    smoothing: float = 0.0,
    z: float = 0.0,
) -> jax.Array:
    """Mean cross entropy in nats, per token or per unit of weight.

    Args:
      weight_BS: what each token counts for.
      smoothing: the share of the target that all of the vocabulary has in equal parts.
      z: times the square of the log of the softmax's denominator, added to the loss of each token.
    """
    V = logits_BSV.shape[-1]
    # A product with a one-hot, not an index: it splits along V like any other sum.
    target_BSV = jax.nn.one_hot(target_BS, V, dtype=jnp.float32)
    if smoothing:
        target_BSV = (1 - smoothing) * target_BSV + smoothing / V
    score_BS = jnp.sum(logits_BSV * target_BSV, axis=-1)
    log_sum_BS = jax.nn.logsumexp(logits_BSV, axis=-1)
    loss_BS = log_sum_BS - score_BS
    if z:
        loss_BS += z * jnp.square(log_sum_BS)
    if weight_BS is None:
        return jnp.mean(loss_BS)
    return jnp.sum(loss_BS * weight_BS) / jnp.maximum(jnp.sum(weight_BS), 1)
