"""to_microbatches, stack_stages, run_layers: a model's batch and layers, fit for a pipeline."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax, tree_util
from jax.sharding import PartitionSpec as P

from gspmd.annotate import annotate
from gspmd.errors import GspmdError


class PipelineError(GspmdError, ValueError):
    """The parts of a pipeline do not fit together."""


def to_microbatches(batch: Any, count: int) -> Any:
    """The rows of a batch as `count` microbatches: arrays `[count, rows of a microbatch, ...]`.

    Microbatch i has rows i, i + count, i + 2 count, ...: each has its share of the rows of every
    device, so that a batch which is split over devices stays where it is. Where the rows do not go
    into the microbatches, the first rows are there once more; `from_microbatches` drops them.

    Args:
      batch: pytree of arrays with a leading dim of rows.
      count: how many microbatches, at most as many as rows.

    Raises:
      PipelineError: there are fewer rows than microbatches, or arrays differ in rows.
    """
    (rows,) = leading(batch, "batch") or (0,)
    if not 1 <= count <= rows:
        raise PipelineError(
            f"a batch of {rows} rows does not go into {count} microbatches: ask for 1 to {rows}."
        )

    def cut(x: Any) -> jax.Array:
        x = jnp.asarray(x)
        if missing := -rows % count:
            x = jnp.concatenate([x, x[:missing]])
        return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(cut, batch)


def from_microbatches(microbatches: Any, rows: int) -> Any:
    """The `rows` of a batch again, in their order, of what a pipeline made of `to_microbatches`."""

    def join(x: Any) -> jax.Array:
        x = jnp.asarray(x)
        if x.ndim < 2 or not x.shape[0] * (x.shape[1] - 1) < rows <= x.shape[0] * x.shape[1]:
            raise PipelineError(
                f"{rows} rows are not what microbatches of shape {x.shape} were cut from: that "
                "begins with the number of microbatches and the rows of each."
            )
        x = x.swapaxes(0, 1)
        return x.reshape(-1, *x.shape[2:])[:rows]

    return jax.tree.map(join, microbatches)


def stack_stages(
    layer_params: Any, stages: int, repeats: int = 1, axis: str | None = None
) -> tuple[Any, jax.Array | None]:
    """The layers dealt out to stages, and which of them are there.

    Where the layers do not go into the stages, the last ones get fewer, and in the place of a layer
    that is missing there is the last one again: what it computes is of no use, but finite.

    Args:
      layer_params: pytree of arrays with a leading dim of layers.
      stages: how many stages.
      repeats: how often a microbatch goes round them; 1: a schedule of "gpipe".
      axis: the mesh axis, or a logical name for one, that splits the layers where they rest, before
        they are dealt out; None leaves that open. In a circular pipeline a stage has layers from
        all over the stack: they are sent there, but no device holds all of them.

    Returns:
      A pytree of arrays `[stages, layers of a stage, ...]`, of a circular pipeline
      `[stages, repeats, layers, ...]`, and a mask of those dims, None where no layer is missing.
      Both together are the `stage_params` of a stage function made by `run_layers`.
    """
    (layers,) = leading(layer_params, "layer_params") or (0,)
    if not layers:
        raise PipelineError("layer_params holds no layer: give arrays with an entry for each.")
    depth = -(-layers // (stages * repeats))
    missing = depth * stages * repeats - layers

    def deal(w: Any) -> jax.Array:
        if axis is not None:
            w = annotate(w, P(axis, *(P.UNCONSTRAINED,) * (jnp.ndim(w) - 1)))
        w = jnp.concatenate([w, *[w[-1:]] * missing]) if missing else jnp.asarray(w)
        dealt = w.reshape(repeats, stages, depth, *w.shape[1:]).swapaxes(0, 1)
        return dealt if repeats > 1 else dealt[:, 0]

    there = jnp.arange(layers + missing).reshape(repeats, stages, depth).swapaxes(0, 1) < layers
    there = there if repeats > 1 else there[:, 0]
    return jax.tree.map(deal, layer_params), there if missing else None


def run_layers(layer_fn: Callable[..., Any], keeps: int = 0) -> Callable[..., Any]:
    """A stage function that runs the layers of `stack_stages`: `layer_fn(params, x, *more) -> y`.

    A layer that is not there passes its input on.

    Args:
      layer_fn: what a layer does; `more` are the side, the cache and the state of the stage.
      keeps: how many of the last of these each layer keeps for itself: they have a leading dim of
        layers, and the layer returns what becomes of its entries, `(y, *kept)`.
    """

    def stage(params_and_mask: tuple[Any, Any], x: Any, *more: Any) -> Any:
        shared, kept = more[: len(more) - keeps], more[len(more) - keeps :]

        def layer(x: Any, one: tuple[Any, Any, tuple[Any, ...]]) -> tuple[Any, tuple[Any, ...]]:
            params, there, old = one
            made = layer_fn(params, x, *shared, *old)
            y, new = (made[0], tuple(made[1:])) if keeps else (made, ())
            if there is None:
                return y, new
            return jax.tree.map(lambda a, b: jnp.where(there, a, b), (y, new), (x, old))

        y, kept = lax.scan(layer, x, (*params_and_mask, kept))
        return (y, *kept) if keeps else y

    return stage


def leading(tree: Any, name: str, dim: int = 0) -> tuple[int, ...]:
    """The one size that `dim` of a tree's arrays has; nothing for an empty tree.

    Raises:
      PipelineError: they have several, or no such dim.
    """
    sizes: dict[int, str] = {}
    for path, leaf in tree_util.tree_leaves_with_path(tree):
        where = f"{name}{tree_util.keystr(path)}"
        if jnp.ndim(leaf) <= dim:
            raise PipelineError(f"{where} has shape {jnp.shape(leaf)}: it needs a dim {dim}.")
        sizes.setdefault(jnp.shape(leaf)[dim], where)
    if len(sizes) > 1:
        (a, first), (b, second), *_ = sizes.items()
        raise PipelineError(
            f"{first} has {a} entries in dim {dim}, {second} has {b}; they must be alike."
        )
    return tuple(sizes)
