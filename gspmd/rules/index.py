"""Rules of data-dependent indexing: gather, scatter, dynamic slices.

A dim that is indexed may be split as well. Each device translates the indices to its own rows:
a gather then yields zeros for rows held elsewhere (the true rows are the sum over the devices), a
scatter drops them. Indices out of bounds mean what they mean unsplit: bounds are those of the whole
array, whatever a device holds.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from gspmd.ir import Op
from gspmd.rules.factor import Dims, FactorRule, Factors, Split, rule
from gspmd.sharding import Axes

DROP = lax.GatherScatterMode.FILL_OR_DROP


def sum_kind(dtype: Any) -> str:
    """The reduction that finds the one contribution which is not zero, or `whole` if none does."""
    if jnp.issubdtype(dtype, jnp.bool_):
        return "or"
    return "sum" if jnp.issubdtype(dtype, jnp.number) else "whole"


def clamped(index: Any, bound: int) -> Any:
    """`index` clamped into [0, bound], in a signed type of at least 32 bits."""
    index = jnp.asarray(index)
    signed = jnp.issubdtype(index.dtype, jnp.signedinteger) and index.dtype.itemsize >= 4
    index = jnp.clip(index, 0, min(bound, int(jnp.iinfo(index.dtype).max)))
    return index if signed else index.astype(jnp.int32)


def localize(
    indices: Any,
    bounds: Sequence[int],
    blocks: Sequence[int],
    axes: Sequence[Axes],
) -> tuple[Any, Any, Any]:
    """The index vectors for a device's shard; which are its own; which are valid.

    Component i of a vector (in the last dim) is valid within [0, bounds[i]], else clamped. It is
    the device's own if it lies in its block of blocks[i] rows along axes[i]; others are moved to
    the nearest row held here.
    """
    own = valid = jnp.ones(indices.shape[:-1], bool)
    parts: list[Any] = []
    for i, (bound, block, names) in enumerate(zip(bounds, blocks, axes, strict=True)):
        index = clamped(indices[..., i], bound)
        valid &= index == indices[..., i]
        if names:
            index -= (lax.axis_index(names) * block).astype(index.dtype)
            own &= (index >= 0) & (index < block)
            index = jnp.clip(index, 0, block - 1)
        parts.append(index)
    dtype = jnp.result_type(*parts)
    return jnp.stack([part.astype(dtype) for part in parts], axis=-1), own, valid


# --- gather


def _gather_params(op: Op, split: Split) -> dict[str, Any]:
    """Slices that take a dim in full now take the shard in full."""
    sizes = tuple(
        local if size == n else size
        for size, n, local in zip(
            op.params["slice_sizes"], op.ins[0].shape, split.in_shapes[0], strict=True
        )
    )
    return {**op.params, "slice_sizes": sizes}


def _gather_call(op: Op, split: Split) -> Callable[..., Any]:
    assert op.call is not None
    call, params = op.call, _gather_params(op, split)
    numbers, sizes = op.params["dimension_numbers"], op.params["slice_sizes"]
    indexed = numbers.start_index_map
    axes = [split.ins[0].dims[d] if sizes[d] == 1 else () for d in indexed]
    if not any(axes):
        return functools.partial(call, **params)
    bounds = [op.ins[0].shape[d] - sizes[d] for d in indexed]
    blocks = [split.in_shapes[0][d] for d in indexed]
    fill = op.params["mode"] == DROP
    params |= {"unique_indices": False, "indices_are_sorted": False}

    def local(operand: Any, indices: Any, **_: Any) -> Any:
        indices, own, valid = localize(indices, bounds, blocks, axes)
        if fill:  # the owner of the clamped index fills
            indices = jnp.where(valid[..., None], indices, -1)
        out = call(operand, indices, **params)
        batch = tuple(d for d in range(out.ndim) if d not in numbers.offset_dims)
        return jnp.where(lax.broadcast_in_dim(own, out.shape, batch), out, jnp.zeros_like(out))

    return local


@rule("gather", params=_gather_params, call=_gather_call)
def gather(op: Op) -> FactorRule:
    """Dims taken in full pass, and dims of the indices; dims taken row by row are summed."""
    (operand, indices), (out,) = op.ins, op.outs
    numbers, sizes = op.params["dimension_numbers"], op.params["slice_sizes"]
    batching = numbers.start_indices_batching_dims
    paired = dict(zip(numbers.operand_batching_dims, batching, strict=True))
    f = Factors()
    batch = f.dims(indices.shape[:-1])
    slices: list[tuple[int, ...]] = []  # of the result's offset dims, in order
    ins: list[tuple[int, ...]] = []
    for d, (n, size) in enumerate(zip(operand.shape, sizes, strict=True)):
        if d in paired:
            ins.append(batch[paired[d]])
            continue
        collapsed = d in numbers.collapsed_slice_dims
        if n == size and not collapsed:
            ins.append((f.new(n),))
            slices.append(ins[-1])
            continue
        summed = size == 1 and n > 1 and d in numbers.start_index_map
        ins.append((f.new(n, sum_kind(operand.dtype) if summed else "whole"),))
        if not collapsed:
            slices.append((f.new(size, "whole"),))
    at, rest = iter(slices), iter(batch)
    outs: Dims = tuple(
        next(at) if d in numbers.offset_dims else next(rest) for d in range(len(out.shape))
    )
    return f.rule(
        [tuple(ins), (*batch, (f.new(indices.shape[-1], "whole"),))],
        [outs],
        linear=((0,),) if _fills_linearly(op) else (),
        forward=1,
        backward=1,
        masked=False,
    )


def _fills_linearly(op: Op) -> bool:
    """Whether rows out of bounds are zero, or NaN, which sums to NaN again."""
    fill = op.params["fill_value"]
    return op.params["mode"] != DROP or fill == 0 or fill != fill


# --- scatter


def _window_sizes(op: Op) -> dict[int, int]:
    """For each dim of the operand that is no batching dim: how much of it one update covers."""
    numbers = op.params["dimension_numbers"]
    windows = iter(numbers.update_window_dims)
    return {
        d: 1 if d in numbers.inserted_window_dims else op.ins[2].shape[next(windows)]
        for d in range(len(op.ins[0].shape))
        if d not in numbers.operand_batching_dims
    }


UPDATE_KINDS = {
    "scatter-add": "sum",
    "scatter-sub": "sum",
    "scatter-max": "max",
    "scatter-min": "min",
}
LINEAR = {"scatter-add": ((0, 2),), "scatter-sub": ((0, 2),), "scatter-mul": ((0,),)}


def _scatter_call(op: Op, split: Split) -> Callable[..., Any]:
    assert op.call is not None
    call, params = op.call, dict(op.params)
    numbers, windows = op.params["dimension_numbers"], _window_sizes(op)
    indexed = numbers.scatter_dims_to_operand_dims
    axes = [split.ins[0].dims[d] if windows.get(d) == 1 else () for d in indexed]
    shared = _shared_axes(op, split)
    if not any(axes) and not shared:
        return functools.partial(call, **params)
    bounds = [op.ins[0].shape[d] - windows[d] for d in indexed]
    blocks = [split.in_shapes[0][d] for d in indexed]
    clamp = op.params["mode"] == lax.GatherScatterMode.CLIP
    summed = UPDATE_KINDS.get(op.name) == "sum"
    params |= {"unique_indices": False, "indices_are_sorted": False}

    def local(operand: Any, indices: Any, updates: Any, **_: Any) -> Any:
        if shared and summed:  # each device adds its share of the updates; the operand counts once
            first = lax.axis_index(shared) == 0
            operand = jnp.where(first, operand, jnp.zeros_like(operand))
        if not any(axes):
            return call(operand, indices, updates, **params)
        indices, own, valid = localize(indices, bounds, blocks, axes)
        kept = own if clamp else own & valid
        indices = jnp.where(kept[..., None], indices, -1)
        return call(operand, indices, updates, **{**params, "mode": DROP})

    return local


def _shared_axes(op: Op, split: Split) -> Axes:
    """The axes over which the devices share out the updates."""
    batching = op.params["dimension_numbers"].scatter_indices_batching_dims
    dims = split.ins[1].dims[:-1]
    return tuple(axis for d, axes in enumerate(dims) if d not in batching for axis in axes)


@rule(
    "scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-max", "scatter-min",
    call=_scatter_call,
)  # fmt: skip
def scatter(op: Op) -> FactorRule:
    """Dims updated in full pass, and dims updated row by row, where the updates stay whole.

    The updates themselves are shared out if their order does not matter.
    """
    operand, indices, updates = op.ins
    numbers, windows = op.params["dimension_numbers"], _window_sizes(op)
    batching = numbers.scatter_indices_batching_dims
    paired = dict(zip(numbers.operand_batching_dims, batching, strict=True))
    f = Factors()
    kind = UPDATE_KINDS.get(op.name, "whole")
    batch = [
        (f.new(n, "pass" if d in batching else kind),) for d, n in enumerate(indices.shape[:-1])
    ]
    ins: list[tuple[int, ...]] = []
    slices: list[tuple[int, ...]] = []  # of the updates' window dims, in order
    for d, n in enumerate(operand.shape):
        if d in paired:
            ins.append(batch[paired[d]])
            continue
        row = windows[d] == 1 and d in numbers.scatter_dims_to_operand_dims
        full = windows[d] == n and d not in numbers.inserted_window_dims
        ins.append((f.new(n, "pass" if row or full else "whole"),))
        if d not in numbers.inserted_window_dims:
            slices.append(ins[-1] if full else (f.new(windows[d], "whole"),))
    at, rest = iter(slices), iter(batch)
    update_dims: Dims = tuple(
        next(at) if d in numbers.update_window_dims else next(rest)
        for d in range(len(updates.shape))
    )
    return f.rule(
        [tuple(ins), (*batch, (f.new(indices.shape[-1], "whole"),)), update_dims],
        [tuple(ins)],
        linear=LINEAR.get(op.name, ()),
        forward=1,
        backward=1,
    )


# --- dynamic slices


def _dynamic_slice_params(op: Op, split: Split) -> dict[str, Any]:
    return {**op.params, "slice_sizes": split.out_shapes[0]}


def _dynamic_slice_call(op: Op, split: Split) -> Callable[..., Any]:
    assert op.call is not None
    call, params = op.call, _dynamic_slice_params(op, split)
    shape, sizes = op.ins[0].shape, op.params["slice_sizes"]
    cut = {d: axes for d, axes in enumerate(split.ins[0].dims) if axes and shape[d] != sizes[d]}
    if not cut:
        return functools.partial(call, **params)

    def local(operand: Any, *starts: Any, **_: Any) -> Any:
        begin = _clamped_starts(starts, shape, sizes)
        taken = [operand.shape[d] if d in cut else n for d, n in enumerate(params["slice_sizes"])]
        out = lax.dynamic_slice(operand, [0 if d in cut else x for d, x in enumerate(begin)], taken)
        for d, names in cut.items():
            block = operand.shape[d]
            row = begin[d] - lax.axis_index(names) * block + jnp.arange(sizes[d])
            out = jnp.take(out, jnp.clip(row, 0, block - 1), axis=d)
            own = lax.broadcast_in_dim((row >= 0) & (row < block), out.shape, (d,))
            out = jnp.where(own, out, jnp.zeros_like(out))
        return out

    return local


def _clamped_starts(
    starts: Sequence[Any], shape: Sequence[int], sizes: Sequence[int]
) -> tuple[Any, ...]:
    """The starts that keep a slice within the whole array, all of one type."""
    begin = [clamped(x, n - size) for x, n, size in zip(starts, shape, sizes, strict=True)]
    dtype = jnp.result_type(*begin)
    return tuple(x.astype(dtype) for x in begin)


@rule("dynamic_slice", params=_dynamic_slice_params, call=_dynamic_slice_call)
def dynamic_slice(op: Op) -> FactorRule:
    """Dims taken in full pass; dims of which at most half is taken are summed."""
    f = Factors()
    ins: list[tuple[int, ...]] = []
    outs: list[tuple[int, ...]] = []
    for n, size in zip(op.ins[0].shape, op.outs[0].shape, strict=True):
        kind = sum_kind(op.ins[0].dtype) if 2 * size <= n else "whole"
        ins.append((f.new(n, "pass" if size == n else kind),))
        outs.append(ins[-1] if size == n else (f.new(size, "whole"),))
    return f.rule(
        [tuple(ins), *[()] * len(op.ins[1:])],
        [tuple(outs)],
        linear=((0,),),
        forward=0,
        backward=1,
        masked=False,
    )


def _dynamic_update_slice_call(op: Op, split: Split) -> Callable[..., Any]:
    assert op.call is not None
    call = op.call
    shape, sizes = op.ins[0].shape, op.ins[1].shape
    cut = {d: axes for d, axes in enumerate(split.ins[0].dims) if axes and shape[d] != sizes[d]}
    if not cut:
        return call

    def local(operand: Any, update: Any, *starts: Any, **_: Any) -> Any:
        """Writes to the window of the shard that is nearest the update what of it falls there."""
        begin = list(_clamped_starts(starts, shape, sizes))
        falls: Any = jnp.bool_(True)
        for d, names in cut.items():
            block = operand.shape[d]
            size = min(sizes[d], block)
            start = begin[d] - (lax.axis_index(names) * block).astype(begin[d].dtype)
            begin[d] = jnp.clip(start, 0, block - size)
            row = begin[d] - start + jnp.arange(size)  # of the update
            update = jnp.take(update, jnp.clip(row, 0, sizes[d] - 1), axis=d)
            inside = (row >= 0) & (row < sizes[d])
            falls &= inside.reshape([-1 if e == d else 1 for e in range(update.ndim)])
        old = lax.dynamic_slice(operand, begin, update.shape)
        return call(operand, jnp.where(falls, update, old), *begin, **op.params)

    return local


@rule("dynamic_update_slice", call=_dynamic_update_slice_call)
def dynamic_update_slice(op: Op) -> FactorRule:
    """All dims of the operand pass; the update is whole where it is smaller than the operand."""
    f = Factors()
    operand, update = op.ins[:2]
    dims = f.dims(operand.shape)
    smaller: Dims = tuple(
        factor if n == m else (f.new(m, "whole"),)
        for n, m, factor in zip(operand.shape, update.shape, dims, strict=True)
    )
    return f.rule(
        [dims, smaller, *[()] * len(op.ins[2:])], [dims], linear=((0, 1),), forward=0, backward=1
    )
