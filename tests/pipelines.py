"""A small model in a pipeline, and what the tests of pipelines ask of it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gspmd
from gspmd import P, annotate

SCHEDULES = {1: "gpipe", 2: "circular", 3: "circular"}


def array(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(scale=0.5, size=shape), jnp.float32)


def close(found: Any, expected: Any) -> None:
    """Both trees are alike, integers exactly."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (jnp.shape(a), jnp.result_type(a)) == (jnp.shape(b), jnp.result_type(b))
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)


def mlp(w: Any, x: jax.Array) -> jax.Array:
    """A residual MLP: its roles are those of Megatron's."""
    h = annotate(jnp.tanh(annotate(x, P("batch", None)) @ w["up"]), P("batch", "hidden"))
    return x + annotate(h @ w["down"], P("batch", None))


def layers(count: int, dim: int = 8, hidden: int = 16) -> dict[str, jax.Array]:
    return {"up": array(count, dim, hidden), "down": array(count, hidden, dim, seed=1)}


def run_in_sequence(layer: Callable[..., Any], w: Any, x: Any) -> Any:
    for i in range(jax.tree.leaves(w)[0].shape[0]):
        x = layer(jax.tree.map(lambda a, i=i: a[i], w), x)
    return x


def model(
    stages: int, micro: int, repeats: int = 1, layer: Callable[..., Any] = mlp, **options: Any
) -> Callable[..., Any]:
    """A function of layers and a batch, by a pipeline."""

    def apply(w: Any, batch: jax.Array) -> jax.Array:
        made = gspmd.pipeline(
            gspmd.run_layers(layer), gspmd.stack_stages(w, stages, repeats),
            gspmd.to_microbatches(batch, micro), stages=stages, schedule=SCHEDULES[repeats],
            repeats=repeats, **options,
        )  # fmt: skip
        return gspmd.from_microbatches(made, batch.shape[0])

    return apply


def crossing(plan: gspmd.Plan, axis: str = "stage") -> list[tuple[str, int, float]]:
    """The collectives over an axis: their kind, how often they run, and their operand's bytes."""
    return [(c.kind, c.trips, c.bytes) for c in plan.collectives if axis in c.axes]


def loss_of(apply: Callable[..., Any]) -> Callable[..., Any]:
    return jax.value_and_grad(lambda w, x: jnp.sum(jnp.sin(apply(w, x))), (0, 1))
