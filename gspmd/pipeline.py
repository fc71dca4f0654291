"""pipeline: stages as a leading dim of stacked weights, which a mesh axis splits like any other.

All stages run at once, each on another microbatch; between two ticks what they made moves on by one
stage. Where the leading dim is split, the partitioner turns that shift into one
`collective_permute`, and each device runs its own stage (GSPMD, section 3.3; Praxis'
LayerwiseShardablePipelined). With m microbatches and p stages that takes m + p - 1 ticks, of which
p - 1 are a bubble; a circular pipeline runs each microbatch v times round p stages, for which it
takes v m + p - 1 ticks of a v-th of the work: a share of (p - 1) / (v m + p - 1) is idle.

Microbatches wait for the first stage in a queue. What has come round goes back to it, into the
place of what is through: inputs, outputs and what waits for its next round share their memory.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax, tree_util
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from gspmd.annotate import annotate
from gspmd.bubble import At, Step, Ticks, either, guarded, opened
from gspmd.ir import PIPELINE
from gspmd.rules.pointwise import is_pointwise
from gspmd.stages import (
    TAKES_ITS_PLACE,
    PipelineError,
    alike,
    entries,
    leading,
    show_types,
    takes,
    whole,
)

Schedule = Literal["gpipe", "circular"]
Policy = Callable[..., Any]

MOVES = frozenset(
    {
        "broadcast_in_dim", "dynamic_slice", "gather", "gspmd_annotate", "reshape", "slice",
        "squeeze", "transpose",
    }
)  # fmt: skip
"""Primitives that compute nothing."""


def pipeline(
    stage_fn: Callable[..., Any],
    stage_params: Any,
    microbatches: Any,
    *,
    stages: int,
    axis: str = "stage",
    schedule: Schedule = "gpipe",
    repeats: int = 1,
    remat: bool | Policy = False,
    sides: Any = None,
    cache: Any = None,
    state: Any = None,
) -> Any:
    """What the last stage makes of each microbatch: the same as the stages one after the other.

    What a stage does in the bubble, be it NaN, is in no result and in no gradient.

    Args:
      stage_fn: `stage_fn(params, x) -> y`, x and y of one structure and shape. Those of `sides`,
        `cache` and `state` that are given follow x, in this order; those of `cache` and `state`
        follow y in what it returns: `(y, cache, state)`.
      stage_params: pytree whose arrays have a leading dim of `stages`, and one of `repeats` after
        it where that is above 1: a microbatch meets entry [s, r] as number r * stages + s.
      microbatches: pytree of arrays, one microbatch for each entry of the leading dim; see
        `gspmd.to_microbatches`.
      stages: stages that run at once; a multiple of what `axis` has in the mesh, or as many.
      axis: the mesh axis that splits them, or a logical name for one. A rule that maps it to None
        leaves all stages on each device, which then does the bubble's work as well.
      schedule: "gpipe", or "circular", which goes round.
      repeats: how often a microbatch goes round, in a circular pipeline.
      remat: keep for the backward pass only what goes from stage to stage; or the policy of
        `jax.checkpoint` that says what to keep besides. By default products, sums and the like are
        kept, and what is computed entry by entry is computed again.
      sides: pytree of arrays with an entry for each microbatch, which all stages see: masks,
        positions, the encoder's output.
      cache: pytree of arrays with the leading dims of `stage_params` and one of microbatches: what
        a stage keeps of a microbatch from one call to the next, such as keys and values.
      state: pytree of arrays with the leading dims of `stage_params`: what a stage keeps from one
        microbatch to the next, such as sums of a router's losses. Rows that
        `gspmd.to_microbatches` repeats, where these do not divide the batch, count there twice
        unless the stage leaves them out.

    Returns:
      A pytree like `microbatches`. With `cache` or `state`, a tuple of that and what became of
      them.

    Raises:
      PipelineError: leading dims differ from `stages` or from one another, the stage function
        changes its input's shape, or there is no such schedule.
    """
    held = {name: tree for name, tree in (("cache", cache), ("state", state)) if tree is not None}
    others = () if sides is None else (sides,)
    if not (isinstance(remat, bool) or callable(remat)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PipelineError(
            f"remat={remat!r}: it is True, False, or a policy, such as "
            "jax.checkpoint_policies.dots_saveable."
        )
    ticks = _ticks(schedule, stages, repeats, stage_params, microbatches, sides, held)
    fn, enclosed = _opened(stage_fn, ticks, stage_params, microbatches, others, held)
    is_first_S = jnp.arange(ticks.stages) == 0

    def split(tree: Any) -> Any:
        """`tree`, its leading dims split over the axis, and all others as others say."""
        spec = lambda x: P(axis, *(P.UNCONSTRAINED,) * (x.ndim - 1))  # noqa: E731
        return jax.tree.map(lambda x: annotate(x, spec(x)), tree)

    def each(x: Any) -> jax.Array:
        """A copy for each stage, so that none is sent for in the loop."""
        return jnp.broadcast_to(x, (ticks.stages, *jnp.shape(x)))

    def queued(x: Any) -> jax.Array:
        """A queue for each stage, though the first one's alone will be asked."""
        x_S, more = each(x), ticks.places - ticks.microbatches
        return jnp.pad(x_S, [(0, 0), (0, more)] + [(0, 0)] * (x_S.ndim - 2))

    def taken(queue: Any, place: Any, moved: Any) -> Any:
        """What the stages work on: the first on what it takes from the queue."""
        return split(either(is_first_S, jax.tree.map(lambda q: _at(q, place, 1), queue), moved))

    params, held = split(jax.tree.map(jnp.asarray, (stage_params, held)))
    run = _stages(fn, enclosed, split(jax.tree.map(each, others)), ticks, remat)
    queue = split(jax.tree.map(queued, microbatches))
    x = taken(queue, 0, jax.tree.map(lambda q: jnp.zeros_like(q[:, 0]), queue))

    def tick(carry: tuple[Any, Any, Any], step: Step) -> tuple[tuple[Any, Any, Any], None]:
        x, queue, held = carry
        made, held = run(params, x, held, step.at)
        moved = jax.tree.map(lambda a: split(jnp.roll(a, 1, axis=0)), split(made))
        # To take after putting lets XLA update the queue in place.
        queue = jax.tree.map(lambda q, a: split(_put(q, a, step.leaves, 1)), queue, moved)
        return (taken(queue, step.enters, moved), queue, split(held)), None

    with jax.named_scope(PIPELINE):  # by which a report knows the loop, and the one of its gradient
        (_, queue, held), _ = lax.scan(tick, (x, queue, held), ticks.steps())
    outs = jax.tree.map(lambda q: _out(q[:, : ticks.microbatches], is_first_S, ticks), queue)
    return (outs, *held.values()) if held else outs


def _stages(
    fn: Callable[..., Any],
    enclosed: list[jax.Array],
    sides: tuple[Any, ...],
    ticks: Ticks,
    remat: bool | Policy,
) -> Callable[..., Any]:
    """What all stages do in a tick: `(params, x, held, at) -> (y, held)`."""
    goes_round = ticks.repeats > 1
    dims = {"cache": 1 + goes_round, "state": int(goes_round)}

    def run(params: Any, x: Any, old: dict[str, Any], shared: Any, at: At) -> Any:
        if goes_round:
            params = _entries(params, at.round, 1)
        sides, enclosed = shared
        side = _entries(sides, at.micro, 1)
        copies = [jnp.broadcast_to(a, (ticks.stages, *a.shape)) for a in enclosed]
        given = guarded(at.valid, (copies, params, x, *side, *old.values()))
        y, *new = jax.vmap(fn)(*given)
        return y, either(at.valid, dict(zip(old, new, strict=True)), old)

    policy = remat if callable(remat) else None if remat else _is_dear
    run = jax.checkpoint(run, prevent_cse=False, policy=policy)

    def stages(params: Any, x: Any, held: dict[str, Any], at: At) -> tuple[Any, dict[str, Any]]:
        places = {"cache": at.round * ticks.microbatches + at.micro, "state": at.round}
        old = {name: _entries(tree, places[name], dims[name]) for name, tree in held.items()}
        y, new = run(params, x, old, (sides, enclosed), at)
        return y, {
            name: _with_entries(tree, places[name], dims[name], new[name])
            for name, tree in held.items()
        }

    return stages


def _is_dear(primitive: Any, *ins: Any, **_: Any) -> bool:
    """Whether to keep what a primitive makes for the backward pass, rather than make it again.

    What is kept is kept for each tick. What a tick picks of the weights, or makes masks of, would
    take more memory than the activations; and what takes one operation an entry is made sooner than
    it is written and read. Complex numbers no policy of JAX may keep.
    """
    is_complex = any(jnp.issubdtype(getattr(x, "dtype", bool), jnp.complexfloating) for x in ins)
    cheap = primitive.name in MOVES or is_pointwise(primitive.name)
    return not (cheap or is_complex or primitive.name in ("fft", "eig"))


_at = functools.partial(lax.dynamic_index_in_dim, keepdims=False, allow_negative_indices=False)
_put = functools.partial(lax.dynamic_update_index_in_dim, allow_negative_indices=False)


def _entry(tree: Any, i: jax.Array, dims: int) -> Any:
    """Entry `i` of those that the first `dims` dims hold; with none, all there is."""
    return jax.tree.map(lambda a: _at(_flat(a, dims), i, 0), tree) if dims else tree


def _entries(tree: Any, i_S: jax.Array, dims: int) -> Any:
    """The entry of each stage."""
    return jax.vmap(functools.partial(_entry, dims=dims))(tree, i_S)


def _with_entries(tree: Any, i_S: jax.Array, dims: int, new: Any) -> Any:
    """`tree` with `new` as the entry of each stage."""

    def put(a: jax.Array, x: jax.Array) -> jax.Array:
        return jax.vmap(lambda a, x, i: _put(_flat(a, dims), x, i, 0).reshape(a.shape))(a, x, i_S)

    return jax.tree.map(put, tree, new) if dims else new


def _flat(a: jax.Array, dims: int) -> jax.Array:
    return a.reshape(-1, *a.shape[dims:])


def _out(q: jax.Array, is_first_S: jax.Array, ticks: Ticks) -> jax.Array:
    """What the first stage has in its queue `q`: a sum, which reaches its users as they need it.

    It is named, so that a plan can tell of which pipeline it comes.
    """
    own = either(is_first_S, q, jnp.zeros_like(q))
    add = lax.reduce_or if q.dtype == bool else lax.reduce_sum
    busy = ticks.repeats * ticks.microbatches
    numbers = f"{ticks.stages} {ticks.microbatches} {ticks.count} {busy}"
    return checkpoint_name(add(own, (0,)), f"{PIPELINE} {numbers}")


# ------------------------------------------------------------------------- what a pipeline is given


def _opened(
    stage_fn: Callable[..., Any],
    ticks: Ticks,
    params: Any,
    x: Any,
    sides: tuple[Any, ...],
    held: Mapping[str, Any],
) -> tuple[Callable[..., Any], list[jax.Array]]:
    """The stage function, as one of the arrays that it encloses and of its arguments; and these.

    They are those that may have a gradient, to which a stage that is in the bubble adds nothing.

    Raises:
      PipelineError: it does not return what it takes.
    """
    own = 1 + (ticks.repeats > 1)
    dims = {"cache": own + 1, "state": own}
    one, side = _first(x, 1), _first(sides, 1)
    kept = {name: _first(tree, dims[name]) for name, tree in held.items()}
    args = (_first(params, own), one, *side, *kept.values())
    takes("stage_fn", stage_fn, "params", "x", *["side"] * len(sides), *kept)
    call, enclosed, made = opened(stage_fn, *args)
    if held and not (isinstance(made, tuple) and len(made) == 1 + len(held)):
        raise PipelineError(
            f"stage_fn must return ({', '.join(['y', *held])}), since the pipeline has a "
            f"{' and a '.join(held)}."
        )
    y, *new = made if held else (made,)
    why = "every stage's output is another's input"
    around = (
        "Put what changes the shape, such as embedding and softmax, before and after the pipeline; "
        f"the stage was given {show_types(args[0])}, repeats={ticks.repeats}"
    )
    alike("stage_fn", "its input", one, y, why, around)
    for name, after in zip(kept, new, strict=True):
        alike("stage_fn", f"the {name}", kept[name], after, TAKES_ITS_PLACE)
    fn = call if held else lambda *given: (call(*given),)
    return fn, enclosed


def _first(tree: Any, dims: int) -> Any:
    """The first entry of arrays along their leading dims, of which nothing but the type counts."""
    return jax.tree.map(lambda x: jnp.asarray(x)[(0,) * dims], tree)


def _ticks(
    schedule: str,
    stages: int,
    repeats: int,
    params: Any,
    microbatches: Any,
    sides: Any,
    held: Mapping[str, Any],
) -> Ticks:
    if schedule not in ("gpipe", "circular"):
        raise PipelineError(f"schedule={schedule!r}: it is 'gpipe' or 'circular'.")
    stages, repeats = whole("stages", stages), whole("repeats", repeats)
    if schedule == "gpipe" and repeats > 1:
        raise PipelineError(
            f"repeats={repeats} is for schedule='circular'; 'gpipe' goes round once."
        )
    count = entries(microbatches, "microbatches")
    for path, leaf in tree_util.tree_leaves_with_path(microbatches):
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            raise PipelineError(
                f"microbatches{tree_util.keystr(path)} holds random keys, which are no activations "
                "to go from stage to stage: pass them as `sides`."
            )
    own = (("stages", stages),) + (("repeats", repeats),) * (repeats > 1)
    each = ("microbatches", count)
    wanted = {"stage_params": (params, own), "sides": (sides, (each,))}
    wanted["cache"] = (held.get("cache"), (*own, each))
    wanted["state"] = (held.get("state"), own)
    for name, (tree, numbers) in wanted.items():
        for dim, (what, number) in enumerate(numbers):
            for size in leading(tree, name, dim):
                if size != number:
                    deal = "; gspmd.stack_stages deals out layers to stages" * (what != each[0])
                    raise PipelineError(
                        f"{name} has {size} entries in dim {dim}, but there are {number} {what}: "
                        f"give one for each{deal}."
                    )
    return Ticks(stages, count, repeats)
