"""to_microbatches, stack_stages, run_layers: a model's batch and layers, fit for a pipeline."""

import inspect
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax, tree_util
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from gspmd.annotate import annotate
from gspmd.bubble import either, guarded, opened
from gspmd.errors import GspmdError
from gspmd.ir import PADDING


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
    count, rows = whole("count", count), entries(batch, "batch")
    if count > rows:
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
    rows = whole("rows", rows)

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
    that is missing there is the last one again: what it computes, be it NaN, `run_layers` drops.

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
    stages, repeats = whole("stages", stages), whole("repeats", repeats)
    layers = entries(layer_params, "layer_params")
    depth = -(-layers // (stages * repeats))
    missing = depth * stages * repeats - layers

    def deal(w: Any) -> jax.Array:
        if axis is not None:
            w = annotate(w, P(axis, *(P.UNCONSTRAINED,) * (jnp.ndim(w) - 1)))
        w = jnp.concatenate([w, *[w[-1:]] * missing]) if missing else jnp.asarray(w)
        dealt = w.reshape(repeats, stages, depth, *w.shape[1:]).swapaxes(0, 1)
        return dealt if repeats > 1 else dealt[:, 0]

    dealt = jax.tree.map(deal, layer_params)
    if not missing:
        return dealt, None
    places = jnp.arange(layers + missing).reshape(repeats, stages, depth).swapaxes(0, 1)
    there = checkpoint_name(places < layers, f"{PADDING} {layers} {layers + missing}")
    return dealt, there if repeats > 1 else there[:, 0]


def run_layers(layer_fn: Callable[..., Any], keeps: int = 0) -> Callable[..., Any]:
    """A stage function that runs the layers of `stack_stages`: `layer_fn(params, x, *more) -> y`.

    A layer that is not there passes its input on.

    Args:
      layer_fn: what a layer does; `more` are the side, the cache and the state of the stage.
      keeps: how many of the last of these each layer keeps for itself: they have a leading dim of
        layers, and the layer returns what becomes of its entries, `(y, *kept)`.
    """

    def stage(params_and_mask: Any, x: Any, *more: Any) -> Any:
        params, mask = _dealt(params_and_mask)
        shared, kept = more[: len(more) - keeps], more[len(more) - keeps :]
        call, enclosed = _layer(layer_fn, params, x, shared, kept, keeps)

        def layer(x: Any, one: tuple[Any, Any, tuple[Any, ...]]) -> tuple[Any, tuple[Any, ...]]:
            params, there, old = one
            given = enclosed, params, x, *shared, *old
            made = call(*(given if there is None else guarded(there, given)))
            y, new = (made[0], tuple(made[1:])) if keeps else (made, ())
            return (y, new) if there is None else either(there, (y, new), (x, old))

        y, kept = lax.scan(layer, x, (params, mask, kept))
        return (y, *kept) if keeps else y

    return stage


def _dealt(params_and_mask: Any) -> tuple[Any, jax.Array | None]:
    """What `stack_stages` returns of one stage."""
    if isinstance(params_and_mask, (tuple, list)) and len(params_and_mask) == 2:
        params, mask = params_and_mask
        if mask is None or (getattr(mask, "dtype", "") == "bool" and jnp.ndim(mask) == 1):
            return params, mask
    raise PipelineError(
        "the stages of run_layers take as stage_params what gspmd.stack_stages returns, the layers "
        f"and the mask of those that are there; a stage was given {show_types(params_and_mask)}."
    )


def _layer(
    layer_fn: Callable[..., Any],
    params: Any,
    x: Any,
    shared: tuple[Any, ...],
    kept: tuple[Any, ...],
    keeps: int,
) -> tuple[Callable[..., Any], list[jax.Array]]:
    """`layer_fn`, as one of the arrays that it encloses and of its arguments; and these.

    Raises:
      PipelineError: it does not return what it takes, or keeps what the pipeline does not have.
    """
    if len(kept) != keeps:
        raise PipelineError(
            f"keeps={keeps}: a layer keeps one for each of the pipeline's cache and state, and of "
            f"sides, cache and state there are {len(kept)}."
        )
    for depth in leading(params, "stage_params"):
        for size in leading(kept, "what a stage keeps"):
            if size != depth:
                raise PipelineError(
                    f"what a stage keeps has {size} entries for its {depth} layers: after the dims "
                    "of stages and rounds, cache and state have one of the layers of a stage."
                )
    takes("layer_fn", layer_fn, "params", "x", *["side"] * len(shared), *["kept"] * len(kept))
    one, *old = jax.tree.map(lambda a: a[0], (params, *kept))
    call, enclosed, made = opened(layer_fn, one, x, *shared, *old)
    alone = tree_util.tree_structure(made) == tree_util.tree_structure(x)
    more = len(made) - 1 if isinstance(made, tuple) and not alone else 0
    if more != keeps:
        raise PipelineError(
            f"layer_fn returns y and {more} more, but keeps={keeps}: say run_layers(layer_fn, "
            "keeps=...) of as many as it keeps."
        )
    y, *new = made if keeps else (made,)
    why = "every layer's output is another's input"
    alike("layer_fn", "its input", x, y, why, f"The layer was given {show_types(one)}")
    for before, after in zip(old, new, strict=True):
        alike("layer_fn", "what it keeps", before, after, TAKES_ITS_PLACE)
    return call, enclosed


def takes(who: str, fn: Callable[..., Any], *names: str) -> None:
    """Nothing, if `fn` can be called with arguments of these names.

    Raises:
      PipelineError: it cannot.
    """
    try:
        inspect.signature(fn).bind(*names)
    except TypeError as error:
        raise PipelineError(
            f"{who} is called with ({', '.join(names)}), which it does not take: {error}."
        ) from error
    except ValueError:
        pass  # some callables have no signature


TAKES_ITS_PLACE = "what it returns takes the place of what it was given"


def alike(who: str, what: str, given: Any, made: Any, why: str, otherwise: str = "") -> None:
    """Nothing, where `made` has the structure, the shapes and the dtypes of `given`.

    Raises:
      PipelineError: it has not, which is wrong for the reason `why`; a shape may be so `otherwise`.
    """
    trees = tree_util.tree_structure(given), tree_util.tree_structure(made)
    if trees[0] != trees[1]:
        raise PipelineError(f"{who} returns {trees[1]} for {what} of structure {trees[0]}; {why}.")
    leaves = tree_util.tree_leaves_with_path(given)
    for (path, a), b in zip(leaves, tree_util.tree_leaves(made), strict=True):
        if (jnp.shape(a), a.dtype) != (b.shape, b.dtype):
            cast = ": cast it back" * (jnp.shape(a) == b.shape)
            raise PipelineError(
                f"{who} returns {show_types(b)} for {what}{tree_util.keystr(path)} of "
                f"{show_types(a)}; {why}{cast or f'. {otherwise}' * bool(otherwise)}."
            )


def show_types(tree: Any) -> str:
    """The types of the arrays in a tree, as far as they fit into a message."""
    leaves = tree_util.tree_leaves(tree)
    types = [f"{jnp.result_type(x)}{list(jnp.shape(x))}" for x in leaves[:4]]
    return ", ".join([*types, *["..."] * (len(leaves) > 4)]) or "nothing"


def whole(name: str, value: Any) -> int:
    """`value`, a whole number of at least 1.

    Raises:
      PipelineError: it is something else.
    """
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise PipelineError(f"{name}={value!r}: it is a whole number, at least 1.")
    return number


def entries(tree: Any, name: str) -> int:
    """How many entries a tree's arrays have along their leading dim.

    Raises:
      PipelineError: there are none, or not the same in all.
    """
    (count,) = leading(tree, name) or (0,)
    if not count:
        raise PipelineError(f"{name} holds none: give arrays with an entry for each.")
    return count


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
