"""Ticks: when the stages of a pipeline work on what, and how the bubble leaves no trace.

In the bubble, before the first microbatch reaches a stage and after the last has left it, a stage
computes like all others, on whatever there is.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


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


# Both functions write out their gradients, for which they keep a bit of each stage. `jnp.where`
# would keep its condition in the shape of its operands, and what it makes of weights, in each tick.


def guarded(valid: jax.Array, tree: Any) -> Any:
    """`tree`; where it is not valid, no gradient comes back.

    The dims of `valid` are the leading dims of all arrays, here and in `either`.
    """
    return jax.tree.map(lambda x: _guard(valid, x) if _is_smooth(x) else x, tree)


def either(valid: jax.Array, tree: Any, other: Any) -> Any:
    """`tree` where it is valid, else the `other`."""

    def choose(x: jax.Array, y: jax.Array) -> jax.Array:
        return (_choose if _is_smooth(x) else _where)(valid, x, y)

    return jax.tree.map(choose, tree, other)


def _is_smooth(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _where(valid: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.where(valid.reshape(*valid.shape, *(1,) * (x.ndim - valid.ndim)), x, y)


def _or_zero(valid: jax.Array, x: jax.Array) -> jax.Array:
    return _where(valid, x, jnp.zeros_like(x))


@jax.custom_vjp
def _guard(valid: jax.Array, x: jax.Array) -> jax.Array:
    return x


@jax.custom_vjp
def _choose(valid: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    return _where(valid, x, y)


_guard.defvjp(
    lambda valid, x: (x, valid),
    lambda valid, ct: (None, _or_zero(valid, ct)),
)
_choose.defvjp(
    lambda valid, x, y: (_where(valid, x, y), valid),
    lambda valid, ct: (None, _or_zero(valid, ct), _or_zero(~valid, ct)),
)


# What is put in a place is taken once. So gradients need not be added up there: that of what was
# taken replaces that of what was put there later. Both the queues and their gradients are updated
# in place; with the gradients that JAX makes of slices, each tick would copy them.


def take(queue: Any, place: jax.Array) -> tuple[Any, Any]:
    """What is at a place of the queues, and the queues; arrays `[stages, places, ...]`."""
    pairs = jax.tree.map(lambda q: (_take if _is_smooth(q) else _taken)(q, place), queue)
    return jax.tree.transpose(jax.tree.structure(queue), jax.tree.structure((0, 0)), pairs)


def put(queue: Any, x: Any, place: jax.Array) -> Any:
    """The queues with `x` at a place."""
    return jax.tree.map(lambda q, a: (_put if _is_smooth(q) else _with)(q, a, place), queue, x)


def _taken(queue: jax.Array, place: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = lax.dynamic_index_in_dim(queue, place, 1, keepdims=False, allow_negative_indices=False)
    return x, queue


def _with(queue: jax.Array, x: jax.Array, place: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(queue, x, place, 1, allow_negative_indices=False)


_take = jax.custom_vjp(_taken)
_take.defvjp(
    lambda queue, place: (_taken(queue, place), place),
    lambda place, cts: (_with(cts[1], cts[0], place), None),
)
_put = jax.custom_vjp(_with)
_put.defvjp(
    lambda queue, x, place: (_with(queue, x, place), place),
    lambda place, ct: (ct, _taken(ct, place)[0], None),
)
