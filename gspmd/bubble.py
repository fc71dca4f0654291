"""Ticks: when the stages of a pipeline work on what, and how the bubble leaves no trace.

In the bubble, before the first microbatch reaches a stage and after the last has left it, a stage
computes like all others, on whatever there is.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import tree_util
from jax.core import eval_jaxpr

from gspmd._compat import is_tracer


class At(NamedTuple):
    """What a stage works on: whether on anything, on which microbatch, and in which round."""

    valid: Any
    micro: Any
    round: Any


class Step(NamedTuple):
    """What happens in a tick: a scalar, or an array with an entry for each stage."""

    at: At  # of each stage
    leaves: Any  # the place in the queue for what comes round
    enters: Any  # the place from which the first stage then takes what comes next


@dataclasses.dataclass(frozen=True, slots=True)
class Ticks:
    """When each stage works on what: `microbatches` go `repeats` times round `stages` stages.

    Item k of a stage, its k-th microbatch counted over all rounds, is at stage s in tick k + s. A
    round begins `period` ticks after the one before, when its first microbatch has come round.
    """

    stages: int
    microbatches: int
    repeats: int = 1

    @property
    def period(self) -> int:
        return self.microbatches if self.repeats == 1 else max(self.microbatches, self.stages)

    @property
    def count(self) -> int:
        """Ticks until the last microbatch has left the last stage."""
        return (self.repeats - 1) * self.period + self.microbatches + self.stages - 1

    @property
    def bubble(self) -> float:
        """The share of the stages' ticks in which they have nothing to work on."""
        return 1 - self.repeats * self.microbatches / self.count

    @property
    def places(self) -> int:
        """Places in the queue; the last is for what is in the bubble."""
        return self.period + 1

    def steps(self) -> Step:
        """What happens in each tick: arrays with a leading dim T of ticks, and S of stages."""
        tick_T = np.arange(self.count + 1, dtype=np.int32)
        item_TS = tick_T[:, None] - np.arange(self.stages, dtype=np.int32)
        round_TS, place_TS = np.divmod(item_TS, self.period)
        valid_TS = (round_TS >= 0) & (round_TS < self.repeats) & (place_TS < self.microbatches)
        at = At(valid_TS, np.where(valid_TS, place_TS, 0), np.where(valid_TS, round_TS, 0))
        place_TS = np.where(valid_TS, place_TS, self.period)
        return Step(jax.tree.map(lambda x: x[:-1], at), place_TS[:-1, -1], place_TS[1:, 0])


def guarded(valid_S: jax.Array, tree: Any) -> Any:
    """`tree`, whose arrays have the dims of `valid_S` in front; where not valid, without gradient.

    Zeros for gradients would not do: what a stage does in the bubble may be NaN, and 0 * NaN is.
    """
    smooth = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)  # noqa: E731
    return jax.tree.map(lambda x: _guarded(valid_S, x) if smooth(x) else x, tree)


@jax.custom_jvp
def _guarded(valid_S: jax.Array, x: jax.Array) -> jax.Array:
    return x


@_guarded.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (valid_S, x), (_, tangent) = primals, tangents
    return x, either(valid_S, tangent, jnp.zeros_like(tangent))


def opened(fn: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], list[jax.Array], Any]:
    """`fn` as one of the arrays that it encloses and of its arguments, these, and what it returns.

    They are those that may have a gradient, to which what is not valid adds nothing; of what it
    returns for such arguments there are the types.
    """
    afresh = lambda *args: fn(*args)  # noqa: E731 - JAX remembers a function's jaxpr
    jaxpr, made = jax.make_jaxpr(afresh, return_shape=True)(*args)
    tree = tree_util.tree_structure(made)
    smooth = [is_tracer(x) and jnp.issubdtype(x.dtype, jnp.inexact) for x in jaxpr.consts]

    def call(enclosed: list[jax.Array], *args: Any) -> Any:
        left = iter(enclosed)
        consts = [next(left) if s else x for s, x in zip(smooth, jaxpr.consts, strict=True)]
        leaves = tree_util.tree_leaves(args)
        return tree_util.tree_unflatten(tree, eval_jaxpr(jaxpr.jaxpr, consts, *leaves))

    return call, [x for s, x in zip(smooth, jaxpr.consts, strict=True) if s], made


def either(valid_S: jax.Array, tree: Any, other: Any) -> Any:
    """Of each stage `tree` where it is valid, else the `other`."""

    def choose(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.where(jnp.expand_dims(valid_S, tuple(range(jnp.ndim(valid_S), x.ndim))), x, y)

    return jax.tree.map(choose, tree, other)
