"""Routing: which token goes to which expert, at which place, and with what weight.

Every router here is a frozen dataclass with one method,

    router.route(logits_GSE, key=None, mask_GS=None, dtype=float32) -> Routing

so that a layer with a mixture of experts does not know which one it has:

    routing = router.route(jnp.einsum("GSM,ME->GSE", x_GSM, w_ME), key, dtype=x_GSM.dtype)
    sent_EGCM = dispatch(routing, x_GSM)
    y_GSM = combine(routing, experts(sent_EGCM))

Nothing is annotated here: groups are split as the tokens are, E as the experts' weights are. Where
both take one mesh axis, `dispatch` ends in an all_to_all and `combine` begins with one.

    G groups of tokens, each routed alone    S tokens of a group    E experts
    C places that an expert has for each group (its capacity)       M model dim

* `Top2`: GShard's gating (arXiv 2006.16668), as Lingvo and Praxis do it for GLaM (2112.06905).
* `TopK`: V-MoE's (2106.05974), with noise, Batch Priority Routing, importance and load losses;
  `ROUTERS["top1"]` is Switch's (2101.03961).
* `ExpertChoice` (2202.09368): experts choose their tokens.

Without a key nothing is drawn: no noise, no sampling. A token that `mask_GS` says is padding takes
no place, gets no output and counts in no loss. Gates are float32; the weights that come out are of
`dtype`, which is best that of the tokens.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from gspmd.errors import GspmdError


class RoutingError(GspmdError, ValueError):
    """A router was asked for something that there is not."""


class Routing(NamedTuple):
    """Where the tokens go.

    `combine_GSEC[g, s, e, c]` is the weight of what expert e makes of token s at its place c, 0
    where the token is not there; `dispatch_GSEC` is whether the token is. `loss` is what the router
    adds to the model's loss, the sum of `losses` with the router's weights.
    """

    combine_GSEC: jax.Array
    dispatch_GSEC: jax.Array
    loss: jax.Array
    losses: Mapping[str, jax.Array]


def dispatch(routing: Routing, x_GSM: jax.Array) -> jax.Array:
    """The tokens at the places of their experts, EGCM; empty places hold zeros."""
    return jnp.einsum("GSEC,GSM->EGCM", routing.dispatch_GSEC.astype(x_GSM.dtype), x_GSM)


def combine(routing: Routing, y_EGCM: jax.Array) -> jax.Array:
    """What the experts make of each token, added up by weight, GSM; zeros where none has it."""
    return jnp.einsum("GSEC,EGCM->GSM", routing.combine_GSEC.astype(y_EGCM.dtype), y_EGCM)


# ---------------------------------------------------------------------------------------- routers


@dataclasses.dataclass(frozen=True)
class Top2:
    """GShard's gating: each token goes to its two likeliest experts while they have places.

    All first choices of a group are placed before any second one, in the order of the tokens.

    Args:
      capacity_factor: places per token of a group over all experts; C = int(S * factor / E).
      multiple: C is rounded up to a multiple of this, and is at least one.
      legacy: the two weights are scaled to add up to 1 before places run out, so that a token that
        loses one keeps less than 1 (Lingvo's and Praxis' default); else after.
      second: how the second expert is found: "all" takes the likeliest of the rest; "sampling"
        draws it from the rest by their gates; "random" takes the likeliest of the rest with
        probability gate / `threshold`, else none. These two need a key, and act as "all" without.
      balance: the weight of the balance loss: 1 where the load is even, E where one expert has all.
    """

    capacity_factor: float = 2.0
    multiple: int = 4
    legacy: bool = True
    second: Literal["all", "sampling", "random"] = "all"
    threshold: float = 0.2
    balance: float = 0.01

    @property
    def experts_per_token(self) -> float:
        """How many experts a token is sent to."""
        return 2

    def __post_init__(self) -> None:
        _check(self.capacity_factor, self.multiple)
        if self.second not in ("all", "sampling", "random"):
            raise RoutingError(f"second={self.second!r}: it is 'all', 'sampling' or 'random'.")

    def capacity(self, tokens: int, experts: int) -> int:
        """Places that an expert has for a group of `tokens`."""
        return _rounded(int(tokens * self.capacity_factor / experts), self.multiple)

    def route(
        self,
        logits_GSE: jax.Array,
        key: jax.Array | None = None,
        mask_GS: ArrayLike | None = None,
        dtype: DTypeLike = jnp.float32,
    ) -> Routing:
        """See the module."""
        _, S, E = logits_GSE.shape
        real_GS1 = _real(logits_GSE, mask_GS)
        gate_GSE = jax.nn.softmax(logits_GSE.astype(jnp.float32), axis=-1)
        first_GSE = jax.nn.one_hot(jnp.argmax(gate_GSE, axis=-1), E) * real_GS1
        second_GSE = self._second(gate_GSE, first_GSE, key) * real_GS1

        chosen_GSE = (first_GSE, second_GSE)
        place_GS = _places(chosen_GSE)
        C = self.capacity(S, E)
        kept_GSE = [x * (p < C)[..., None] for x, p in zip(chosen_GSE, place_GS, strict=True)]
        scaled = chosen_GSE if self.legacy else kept_GSE
        sum_GS1 = jnp.sum(gate_GSE * (scaled[0] + scaled[1]), axis=-1, keepdims=True)
        share_GSE = gate_GSE / (sum_GS1 + 1e-9)

        losses = {"balance": balance_loss(gate_GSE, first_GSE, real_GS1)}
        combine_GSEC = _placed(share_GSE, kept_GSE, place_GS, C, dtype)
        return Routing(combine_GSEC, combine_GSEC != 0, self.balance * losses["balance"], losses)

    def _second(
        self, gate_GSE: jax.Array, first_GSE: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        """The second choice of each token, one-hot."""
        E = gate_GSE.shape[-1]
        rest_GSE = jax.lax.stop_gradient(gate_GSE * (1 - first_GSE))
        if key is None or self.second == "all":
            return jax.nn.one_hot(jnp.argmax(rest_GSE, axis=-1), E)
        if self.second == "sampling":
            drawn_GS = jax.random.categorical(key, jnp.log(rest_GSE))
            return jax.nn.one_hot(drawn_GS, E)
        likely_GSE = jax.nn.one_hot(jnp.argmax(rest_GSE, axis=-1), E)
        gate_GS = jnp.max(rest_GSE, axis=-1)
        taken_GS = jax.random.uniform(key, gate_GS.shape) < gate_GS / self.threshold
        return likely_GSE * taken_GS[..., None]


@dataclasses.dataclass(frozen=True)
class TopK:
    """V-MoE's gating: each token goes to its k likeliest experts, weighted by the softmax itself.

    All first choices are placed before any second one; so are, with `batch_priority`, within each
    choice the tokens that are surest of their first. A model trained with one k and capacity runs
    with others: neither is a parameter.

    Args:
      k: experts of a token.
      capacity_factor: places per choice of a group over all experts; C = ceil(S * k * factor / E).
      multiple: C is rounded up to a multiple of this, and is at least one.
      batch_priority: see above; otherwise the order of the tokens decides (arXiv 2106.05974, 4).
      renormalize: scale the k weights to add up to 1, before places run out; else the softmax.
      noise: standard deviation of what is added to the logits, in units of 1 / E; needs a key.
      importance, load, balance: weights of the losses; `load` counts only where there is noise.
    """

    k: int = 2
    capacity_factor: float = 1.05
    multiple: int = 4
    batch_priority: bool = False
    renormalize: bool = False
    noise: float = 1.0
    importance: float = 0.005
    load: float = 0.005
    balance: float = 0.0

    @property
    def experts_per_token(self) -> float:
        """How many experts a token is sent to."""
        return self.k

    def __post_init__(self) -> None:
        _check(self.capacity_factor, self.multiple)
        if self.k < 1:
            raise RoutingError(f"k={self.k}: a token goes to one expert at least.")

    def capacity(self, tokens: int, experts: int) -> int:
        """Places that an expert has for a group of `tokens`."""
        return _rounded(math.ceil(tokens * self.k * self.capacity_factor / experts), self.multiple)

    def route(
        self,
        logits_GSE: jax.Array,
        key: jax.Array | None = None,
        mask_GS: ArrayLike | None = None,
        dtype: DTypeLike = jnp.float32,
    ) -> Routing:
        """See the module."""
        _, S, E = logits_GSE.shape
        if self.k > E:
            raise RoutingError(f"k={self.k} experts for each token, but there are {E}; lower k.")
        real_GS1 = _real(logits_GSE, mask_GS)
        logits_GSE = logits_GSE.astype(jnp.float32)
        noisy_GSE = logits_GSE
        if key is not None:
            noisy_GSE += self.noise / E * jax.random.normal(key, logits_GSE.shape)
        gate_GSE = jax.nn.softmax(noisy_GSE, axis=-1)
        # Indices, not values: what is differentiated are products with their one-hots.
        index_GSK = jax.lax.top_k(jax.lax.stop_gradient(gate_GSE), self.k)[1]
        hot_GSE = [jax.nn.one_hot(index_GSK[..., i], E) for i in range(self.k)]
        chosen_GSE = [x * real_GS1 for x in hot_GSE]

        first_GS = jnp.max(gate_GSE * real_GS1, axis=-1)
        order_GS = jnp.argsort(-first_GS, axis=-1) if self.batch_priority else None
        place_GS = _places(chosen_GSE, order_GS)
        C = self.capacity(S, E)
        kept_GSE = [x * (p < C)[..., None] for x, p in zip(chosen_GSE, place_GS, strict=True)]
        weight_GSE = gate_GSE
        if self.renormalize:
            weight_GSE /= jnp.sum(gate_GSE * sum(hot_GSE), axis=-1, keepdims=True)

        losses = {
            "importance": spread(jax.nn.softmax(logits_GSE, axis=-1) * real_GS1),
            "balance": balance_loss(gate_GSE, chosen_GSE[0], real_GS1),
        }
        loss = self.importance * losses["importance"] + self.balance * losses["balance"]
        if key is not None and self.noise:
            least_GS1 = jnp.sum(noisy_GSE * hot_GSE[-1], axis=-1, keepdims=True)
            above_GSE = load_probability(logits_GSE, least_GS1, self.noise / E)
            losses["load"] = spread(above_GSE * real_GS1)
            loss += self.load * losses["load"]
        combine_GSEC = _placed(weight_GSE, kept_GSE, place_GS, C, dtype)
        return Routing(combine_GSEC, combine_GSEC != 0, loss, losses)


@dataclasses.dataclass(frozen=True)
class ExpertChoice:
    """Each expert takes the C tokens of a group that like it best; no loss, the load is even.

    Not causal: whether a token is taken depends on the tokens after it, as the paper says of it.

    Args:
      capacity_factor: experts per token in the mean; C = int(S * factor / E), one at least, S at
        most.
    """

    capacity_factor: float = 2.0

    @property
    def experts_per_token(self) -> float:
        """How many experts take a token, in the mean."""
        return self.capacity_factor

    def __post_init__(self) -> None:
        _check(self.capacity_factor, 1)

    def capacity(self, tokens: int, experts: int) -> int:
        """Tokens that an expert takes of a group of `tokens`."""
        return min(max(int(tokens * self.capacity_factor / experts), 1), tokens)

    def route(
        self,
        logits_GSE: jax.Array,
        key: jax.Array | None = None,
        mask_GS: ArrayLike | None = None,
        dtype: DTypeLike = jnp.float32,
    ) -> Routing:
        """See the module; nothing is drawn."""
        _, S, E = logits_GSE.shape
        gate_GSE = jax.nn.softmax(logits_GSE.astype(jnp.float32), axis=-1)
        gate_GSE *= _real(logits_GSE, mask_GS)
        score_GES = jax.lax.stop_gradient(jnp.swapaxes(gate_GSE, 1, 2))
        index_GEC = jax.lax.top_k(score_GES, self.capacity(S, E))[1]
        taken_GSEC = jax.nn.one_hot(index_GEC, S, axis=1)
        combine_GSEC = taken_GSEC.astype(dtype) * gate_GSE[..., None].astype(dtype)
        return Routing(combine_GSEC, combine_GSEC != 0, jnp.zeros(()), {})


Router = Top2 | TopK | ExpertChoice


# ------------------------------------------------------------------------------------------ parts


def balance_loss(gate_GSE: jax.Array, first_GSE: jax.Array, real_GS1: jax.Array) -> jax.Array:
    """E * sum over e of (share of first choices) * (mean gate), averaged over groups."""
    E = gate_GSE.shape[-1]
    count_G1 = jnp.maximum(jnp.sum(real_GS1, axis=1), 1)
    share_GE = jnp.sum(first_GSE, axis=1) / count_G1
    gate_GE = jnp.sum(gate_GSE * real_GS1, axis=1) / count_G1
    return E * jnp.mean(jnp.sum(share_GE * gate_GE, axis=-1))


def spread(load_GSE: jax.Array) -> jax.Array:
    """(std / mean)^2 over experts of what they have of each group, averaged over groups."""
    load_GE = jnp.sum(load_GSE, axis=1)
    mean_G = jnp.mean(load_GE, axis=-1)
    return jnp.mean(jnp.var(load_GE, axis=-1) / jnp.maximum(jnp.square(mean_G), 1e-12))


def load_probability(logits_GSE: jax.Array, least_GS1: jax.Array, sigma: float) -> jax.Array:
    """How likely noise of deviation `sigma`, drawn anew, lifts an expert above the k-th score."""
    return jax.scipy.stats.norm.sf((least_GS1 - logits_GSE) / sigma)


def _places(chosen_GSE: Sequence[jax.Array], order_GS: jax.Array | None = None) -> list[jax.Array]:
    """For each choice, the place of each token with the expert it chose; places of none are 0.

    `order_GS[g, i]` is the token that comes i-th in the queues of group g.
    """
    places: list[jax.Array] = []
    filled_G1E = jnp.zeros(())
    for now_GSE in chosen_GSE:
        queue_GSE = now_GSE
        if order_GS is not None:
            queue_GSE = jnp.take_along_axis(now_GSE, order_GS[..., None], axis=1)
        place_GSE = (jnp.cumsum(queue_GSE, axis=1) - queue_GSE + filled_G1E) * queue_GSE
        place_GS = jnp.sum(place_GSE, axis=-1)
        if order_GS is not None:
            place_GS = jnp.take_along_axis(place_GS, jnp.argsort(order_GS, axis=-1), axis=1)
        places.append(place_GS.astype(jnp.int32))
        filled_G1E += jnp.sum(now_GSE, axis=1, keepdims=True)
    return places


def _placed(
    weight_GSE: jax.Array,
    kept_GSE: Sequence[jax.Array],
    place_GS: Sequence[jax.Array],
    capacity: int,
    dtype: DTypeLike,
) -> jax.Array:
    """The weight of each token at its places, GSEC.

    One product over the choices, linear in the weights: a sum that their gradient owes is paid on
    the weights, which are smaller by the capacity.
    """
    weight_GSKE = jnp.stack([weight_GSE * kept for kept in kept_GSE], axis=2)
    place_GSK = jnp.stack(place_GS, axis=2)
    at_GSKC = jax.nn.one_hot(place_GSK, capacity, dtype=dtype)
    return jnp.einsum("GSKE,GSKC->GSEC", weight_GSKE.astype(dtype), at_GSKC)


def _real(logits_GSE: jax.Array, mask_GS: ArrayLike | None) -> jax.Array:
    """1 for a token, 0 for padding."""
    if mask_GS is None:
        return jnp.ones((*logits_GSE.shape[:2], 1), jnp.float32)
    return jnp.asarray(mask_GS, jnp.float32)[..., None]


def _rounded(places: int, multiple: int) -> int:
    return -(-max(places, 1) // multiple) * multiple


def _check(capacity_factor: float, multiple: int) -> None:
    if not capacity_factor > 0:
        raise RoutingError(
            f"capacity_factor={capacity_factor}: experts with no places take no tokens; give more "
            "than 0, such as 1.25."
        )
    if multiple < 1:
        raise RoutingError(f"multiple={multiple}: capacities are multiples of 1 or more.")


ROUTERS: Mapping[str, Router] = MappingProxyType(
    {
        "top2": Top2(),
        "top1": TopK(1, 1.25, noise=0.0, importance=0.0, load=0.0, balance=0.01),
        "vmoe": TopK(),
        "expert_choice": ExpertChoice(),
    }
)
"""The routers as their papers have them; "top1" is Switch's (arXiv 2101.03961)."""
