"""Rules of ops in which the order of a dim's entries counts: sort, top_k, argmax, prefix sums.

Along a split dim each device does its share first, and only the shares' results travel: the k
largest of each, the largest of each, the total of each.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gspmd import local
from gspmd.ir import Op, Operand, Value
from gspmd.rules.build import Builder, resized, value
from gspmd.rules.factor import Dims, FactorRule, Factors, Split, rule
from gspmd.sharding import Axes

INDEX = np.dtype(np.int32)


# --- sort


def _sort_partition(
    b: Builder, op: Op, split: Split, ins: Sequence[Operand]
) -> Sequence[Value] | None:
    """A bitonic sort of the shards: each round a device and a partner keep a half each.

    Batcher's network with blocks for numbers. It sends log2(k) (log2(k) + 1) / 2 blocks, which is
    less than all of them from 8 devices on.
    """
    dim = op.params["dimension"]
    axes = split.ins[0].dims[dim]
    group, block, n = b.mesh.size(axes), split.in_shapes[0][dim], op.ins[0].shape[dim]
    if group & (group - 1):
        return None
    keys = op.params["num_keys"]
    # Padding sorts to the end: it gets the last of all keys, and the last positions.
    xs = [_last_beyond(b, value(x), dim, axes, n) for x in ins[:keys]]
    if len(ins) > keys or not all(jnp.issubdtype(x.dtype, jnp.integer) for x in xs):
        # Equal keys can be told apart, -0.0 from 0.0 at least: they stay in their order.
        how = {"axes": axes, "dim": dim, "shape": xs[0].shape}
        xs += b.local("positions", _positions, [], [(xs[0].shape, INDEX)], **how)
    how = {"dim": dim, "keys": len(xs)}
    others = len(xs)
    xs += map(value, ins[keys:])
    types = [(x.shape, x.dtype) for x in xs]
    xs = b.local("sort_shard", _sort_shard, xs, types, **how)
    span = 2
    while span <= group:
        distance = span // 2
        while distance:
            pairs = tuple((i, i ^ distance) for i in range(group))
            theirs = [b.permute(x, axes, pairs) for x in xs]
            step = {**how, "axes": axes, "span": span, "distance": distance, "block": block}
            xs = b.local("sort_merge", _sort_merge, [*xs, *theirs], types, **step)
            distance //= 2
        span *= 2
    return [*xs[:keys], *xs[others:]]


def _last_beyond(b: Builder, x: Value, dim: int, axes: Axes, n: int) -> Value:
    if n % b.mesh.size(axes) == 0:
        return x
    how = {"dim": dim, "axes": axes, "size": n}
    return b.local("last_beyond", _padding_last, [x], [(x.shape, x.dtype)], **how)[0]


def _padding_last(x: Any, *, dim: int, axes: Axes, size: int, largest: bool = False) -> Any:
    """`x` with what comes last in a sort (of top_k, if `largest`) beyond `size` entries."""
    position = _positions(axes=axes, dim=dim, shape=x.shape)
    return jnp.where(position < size, x, _last(x.dtype, largest))


def _positions(*, axes: Axes, dim: int, shape: tuple[int, ...]) -> Any:
    """For each entry of a shard its position in the whole dim."""
    offset = lax.axis_index(axes).astype(np.int32) * shape[dim]
    return offset + lax.broadcasted_iota(np.int32, shape, dim)


def _sort_shard(*xs: Any, dim: int, keys: int) -> list[Any]:
    return list(lax.sort(xs, dimension=dim, num_keys=keys))


def _sort_merge(
    *xs: Any, dim: int, keys: int, axes: Axes, span: int, distance: int, block: int
) -> list[Any]:
    """The lower or the upper half of what this device and its partner hold."""
    mine, theirs = xs[: len(xs) // 2], xs[len(xs) // 2 :]
    both = [jnp.concatenate(pair, dim) for pair in zip(mine, theirs, strict=True)]
    both = lax.sort(both, dimension=dim, num_keys=keys)
    index = lax.axis_index(axes)
    rising, low = index & span == 0, index & distance == 0
    start = jnp.where(rising == low, 0, block)
    return [lax.dynamic_slice_in_dim(x, start, block, dim) for x in both]


@rule("sort", partition=_sort_partition)
def sort(op: Op) -> FactorRule:
    f = Factors()
    dims: Dims = tuple(
        (f.new(n, exchanged=d == op.params["dimension"]),) for d, n in enumerate(op.ins[0].shape)
    )
    return f.rule([dims] * len(op.ins), [dims] * len(op.outs), forward=1, backward=1)


# --- top_k


def _top_k_partition(
    b: Builder, op: Op, split: Split, ins: Sequence[Operand]
) -> Sequence[Value] | None:
    """The k first of the k first of each shard; among equals those of the first shard."""
    if _is_tiny(op.ins[0].dtype):
        return None
    dim = op.params["axis"] % len(op.ins[0].shape)
    return _first_of_firsts(b, op, split, value(ins[0]), dim, _top_k, largest=True)


def _approx_partition(
    b: Builder, op: Op, split: Split, ins: Sequence[Operand]
) -> Sequence[Value] | None:
    dim = op.params["reduction_dimension"] % len(op.ins[0].shape)
    params = op.params
    if not params["aggregate_to_topk"]:
        return None  # how many candidates there are, the platform decides
    n = params["reduction_input_size_override"]
    whole = n if n > 0 else op.ins[0].shape[dim]
    how = {"recall_target": params["recall_target"], "reduction_input_size_override": whole}
    return _first_of_firsts(
        b, op, split, value(ins[0]), dim, _approx_top_k, params["is_max_k"], **how
    )


def _first_of_firsts(
    b: Builder, op: Op, split: Split, x: Value, dim: int, select: Callable[..., Any],
    largest: bool, **how: Any,
) -> Sequence[Value]:  # fmt: skip
    axes, n, k = split.ins[0].dims[dim], op.ins[0].shape[dim], op.params["k"]
    few = min(k, x.shape[dim])
    outs = [(resized(x, dim, few), x.dtype), (resized(x, dim, few), INDEX)]
    how |= {"dim": dim, "axes": axes, "size": n, "k": few, "largest": largest, "select": select}
    candidates = b.local("first_of_shard", _first_of_shard, [x], outs, **how)
    found = [b.all_gather(c, axes, dim) for c in candidates]
    outs = [(resized(x, dim, k), x.dtype), (resized(x, dim, k), INDEX)]
    return b.local("first_of_all", _first_of_all, found, outs, dim=dim, k=k, largest=largest)


def _first_of_shard(
    x: Any, *, dim: int, axes: Axes, size: int, k: int, largest: bool,
    select: Callable[..., Any], **how: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """The k first entries of a shard in order, with their positions in the whole dim."""
    if x.shape[dim] * lax.axis_size(axes) > size:
        x = _padding_last(x, dim=dim, axes=axes, size=size, largest=largest)
    values, index = select(x, dim, k, largest, **how)
    return values, index + lax.axis_index(axes).astype(np.int32) * x.shape[dim]


def _first_of_all(x: Any, positions: Any, *, dim: int, k: int, largest: bool) -> tuple[Any, Any]:
    values, index = _top_k(x, dim, k, largest)
    return values, jnp.take_along_axis(positions, index, axis=dim)


def _top_k(x: Any, dim: int, k: int, largest: bool) -> tuple[Any, Any]:
    if largest:
        values, index = lax.top_k(x, k, axis=dim)
        return values, index
    order = lax.broadcasted_iota(np.int32, x.shape, dim)
    values, index = lax.sort((x, order), dimension=dim, num_keys=1)
    return lax.slice_in_dim(values, 0, k, axis=dim), lax.slice_in_dim(index, 0, k, axis=dim)


def _approx_top_k(x: Any, dim: int, k: int, largest: bool, **how: Any) -> tuple[Any, Any]:
    select = lax.approx_max_k if largest else lax.approx_min_k
    values, index = select(x, k, dim, **how)
    return values, index


def _is_tiny(dtype: Any) -> bool:
    """Whether these are floats of a byte or less, some of which have no infinity, NaN or sign."""
    return jnp.issubdtype(dtype, jnp.floating) and jax.dtypes.itemsize_bits(dtype) <= 8


def _last(dtype: Any, largest: bool) -> Any:
    """What comes last in an order, rising or falling: a NaN, in top_k the negative one."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return np.asarray(complex(np.nan, np.nan)).astype(dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        return np.asarray(np.copysign(np.nan, -1 if largest else 1)).astype(dtype)
    return local.neutral_value("max" if largest else "min", dtype)


def _selected(op: Op, axis: int, exchanged: bool) -> FactorRule:
    f = Factors()
    axis %= len(op.ins[0].shape)
    dims: Dims = tuple(
        (f.new(n, "pass" if d != axis or exchanged else "whole", exchanged=d == axis),)
        for d, n in enumerate(op.ins[0].shape)
    )
    out = (f.new(op.outs[0].shape[axis], "whole"),)
    kept = (*dims[:axis], out, *dims[axis + 1 :])
    return f.rule([dims], [kept] * len(op.outs), forward=1, backward=1)


@rule("top_k", partition=_top_k_partition)
def top_k(op: Op) -> FactorRule:
    return _selected(op, op.params["axis"], exchanged=True)


@rule("approx_top_k", partition=_approx_partition)
def approx_top_k(op: Op) -> FactorRule:
    return _selected(op, op.params["reduction_dimension"], op.params["aggregate_to_topk"])


# --- argmax, argmin


def _arg_partition(
    b: Builder, op: Op, split: Split, ins: Sequence[Operand]
) -> Sequence[Value] | None:
    """The extremum of the shards' extrema, then the first position that has it."""
    if _is_tiny(op.ins[0].dtype):
        return None
    x = value(ins[0])
    (dim,) = op.params["axes"]
    axes, n = split.ins[0].dims[dim], op.ins[0].shape[dim]
    kind = "max" if op.name == "argmax" else "min"
    x = b.mask(x, dim, axes, n, kind)
    shape = split.out_shapes[0]
    index = max(INDEX, np.dtype(op.params["index_dtype"]), key=lambda d: d.itemsize)
    assert op.call is not None
    (at,) = b.local(op.name, op.call, [x], [(shape, index)], axes=(dim,), index_dtype=index)
    how = {"dim": dim, "axes": axes}
    outs = [(shape, x.dtype), (shape, index)]
    best, position = b.local("entry_at", _entry_at, [x, at], outs, **how)
    extremum = b.all_reduce(best, axes, kind)
    ins = [best, extremum, position]
    (position,) = b.local("where_equal", _where_equal, ins, [(shape, index)])
    position = b.all_reduce(position, axes, "min")
    if index == op.outs[0].dtype:
        return [position]
    (cast,) = b.local("cast", _cast, [position], [(shape, op.outs[0].dtype)], to=op.outs[0].dtype)
    return [cast]


def _entry_at(x: Any, at: Any, *, dim: int, axes: Axes) -> tuple[Any, Any]:
    """The entry of a shard at an index, and its position in the whole dim."""
    entry = jnp.take_along_axis(x, jnp.expand_dims(at, dim), axis=dim)
    return jnp.squeeze(entry, dim), at + lax.axis_index(axes).astype(at.dtype) * x.shape[dim]


def _where_equal(mine: Any, best: Any, position: Any) -> Any:
    """The position where this device has the best entry (NaN equals NaN), else a large one."""
    equal = (mine == best) | ((mine != mine) & (best != best))
    return jnp.where(equal, position, np.iinfo(position.dtype).max)


def _cast(x: Any, *, to: Any) -> Any:
    return x.astype(to)


@rule("argmax", "argmin", partition=_arg_partition)
def arg_reduction(op: Op) -> FactorRule:
    f = Factors()
    axes = op.params["axes"]
    dims: Dims = tuple((f.new(n, exchanged=d in axes),) for d, n in enumerate(op.ins[0].shape))
    kept = tuple(factor for d, factor in enumerate(dims) if d not in axes)
    return f.rule([dims], [kept], forward=1, backward=1)


# --- prefix sums and their like


def _prefix_partition(
    b: Builder, op: Op, split: Split, ins: Sequence[Operand]
) -> Sequence[Value] | None:
    """Each shard's own prefixes, combined with the totals of the shards before it."""
    x = value(ins[0])
    if op.name == "cumlogsumexp" and jnp.issubdtype(x.dtype, jnp.complexfloating):
        return None  # the exponential of the neutral element, -inf - inf i, is NaN
    dim, reverse = op.params["axis"], op.params["reverse"]
    axes, n = split.ins[0].dims[dim], op.ins[0].shape[dim]
    if reverse:  # what lies past the end comes first
        x = b.mask(x, dim, axes, n, PREFIXES[op.name])
    assert op.call is not None
    (own,) = b.local(op.name, op.call, [x], [(x.shape, x.dtype)], axis=dim, reverse=reverse)
    at = 0 if reverse else x.shape[dim] - 1
    shape = resized(x, dim, 1)
    (total,) = b.local("total", _total, [own], [(shape, x.dtype)], dim=dim, at=at)
    totals = b.all_gather(total, axes, dim)
    how = {"dim": dim, "axes": axes, "reverse": reverse, "kind": op.name}
    return b.local("carry_in", _carry_in, [own, totals], [(x.shape, x.dtype)], **how)


PREFIXES = {
    "cumsum": "sum", "cumprod": "prod", "cummax": "max", "cummin": "min", "cumlogsumexp": "max",
}  # fmt: skip
_COMBINE: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "cumsum": (lambda x, dim: jnp.sum(x, dim, x.dtype, keepdims=True), lax.add),
    "cumprod": (lambda x, dim: jnp.prod(x, dim, x.dtype, keepdims=True), lax.mul),
    "cummax": (functools.partial(jnp.max, keepdims=True), lax.max),
    "cummin": (functools.partial(jnp.min, keepdims=True), lax.min),
    "cumlogsumexp": (functools.partial(jax.nn.logsumexp, keepdims=True), jnp.logaddexp),
}


def _total(x: Any, *, dim: int, at: int) -> Any:
    return lax.slice_in_dim(x, at, at + 1, axis=dim)


def _carry_in(own: Any, totals: Any, *, dim: int, axes: Axes, reverse: bool, kind: str) -> Any:
    """`own` combined with the totals of the shards before this one (after it, in reverse)."""
    reduce, combine = _COMBINE[kind]
    index = lax.axis_index(axes)
    shard = lax.broadcasted_iota(np.int32, totals.shape, dim)
    before = shard > index if reverse else shard < index
    neutral = local.neutral_value(PREFIXES[kind], totals.dtype)
    carried = reduce(jnp.where(before, totals, neutral), dim)
    return combine(own, jnp.broadcast_to(carried, own.shape))


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", partition=_prefix_partition)
def cumulative(op: Op) -> FactorRule:
    f = Factors()
    axis = op.params["axis"]
    dims: Dims = tuple((f.new(n, exchanged=d == axis),) for d, n in enumerate(op.ins[0].shape))
    linear = ((0,),) if op.name == "cumsum" else ()
    return f.rule([dims], [dims], linear=linear, forward=1, backward=1)
