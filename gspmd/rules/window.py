"""Rules of windows: convolution, pooling and its gradient.

A dim that a window slides over stays split: each device fetches the entries that its windows reach
into (GSPMD, section 4.3, halo exchange), and then has a window without padding. Where the window
itself is the large one, as in the gradient of a convolution's kernel, the window is split and the
results are summed.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax import lax

from gspmd.exchange import Runs, mine
from gspmd.ir import Literal, Op, Operand, Value
from gspmd.local import neutral_value
from gspmd.rules.build import Builder, resized, value
from gspmd.rules.contract import bilinear
from gspmd.rules.factor import Dims, FactorRule, Factors, Product, Split, rule
from gspmd.rules.stretch import dilated


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """A window of `size` taps, `dilation` apart, that moves by `stride` along one dim.

    Before, the entries of the dim are set `base` apart, and `low` and `high` fillers added.
    """

    size: int
    stride: int = 1
    dilation: int = 1
    base: int = 1
    low: int = 0
    high: int = 0

    @property
    def trivial(self) -> bool:
        """Whether each window is one entry, in order."""
        return self == Window(1, dilation=self.dilation)

    def reach(self, taps: int) -> int:
        """How many positions `taps` neighbouring taps span."""
        return (taps - 1) * self.dilation + 1


def _fetched(
    b: Builder, x: Value, filler: Operand, dim: int, n: int, window: Window,
    axes: tuple[str, ...], start: np.ndarray, size: int,
) -> tuple[Value, Window]:  # fmt: skip
    """The positions `start[device]`, `size` of them, of a padded dim, and the window left to do.

    `x` holds a block of the n entries that the dim has without `window`'s padding.
    """
    first = -(-start // window.base)
    phase = first * window.base - start
    rest = dataclasses.replace(window, low=0, high=0)
    if window.base > 1 and len(set(phase.tolist())) == 1:  # the op itself may set entries apart
        low = int(phase[0])
        count = max(1, (size - 1 - low) // window.base + 1)
        have, want = Runs.blocks(n, b.mesh.size(axes)), Runs.of(first, first + count)
        x = b.exchange([(x, have, (want,))], dim, axes, count, filler)
        high = size - low - ((count - 1) * window.base + 1)
        if high >= 0:
            return x, dataclasses.replace(rest, low=low, high=high)
    x = dilated(b, x, filler, dim, axes, n, window.base, start, size)
    return x, dataclasses.replace(rest, base=1)


# --- convolution


def _conv_windows(op: Op) -> list[tuple[int, int, int, Window]]:
    """For each spatial dim: which dim of lhs, rhs and result it is, and the window."""
    params = op.params
    lhs, rhs, out = (spec[2:] for spec in params["dimension_numbers"])
    rows = zip(
        lhs, rhs, out, params["window_strides"], params["rhs_dilation"], params["lhs_dilation"],
        params["padding"], strict=True,
    )  # fmt: skip
    return [
        (i, j, k, Window(op.ins[1].shape[j], stride, dilation, base, *padding))
        for i, j, k, stride, dilation, base, padding in rows
    ]


def _conv_params(op: Op, split: Split) -> dict[str, Any]:
    """Fewer groups, if groups are split."""
    (_, c), (_, i) = (spec[:2] for spec in op.params["dimension_numbers"][:2])
    (n, *_), _, (m, *_) = op.params["dimension_numbers"]
    (left, right), (out,) = split.in_shapes, split.out_shapes
    params = dict(op.params)
    if params["feature_group_count"] > 1:
        params["feature_group_count"] = left[c] // right[i]
    if params["batch_group_count"] > 1:
        params["batch_group_count"] = left[n] // out[m]
    return params


def _conv_partition(b: Builder, op: Op, split: Split, ins: Sequence[Operand]) -> Sequence[Value]:
    lhs, rhs = map(value, ins)
    zero = Literal(np.zeros((), lhs.dtype)[()], lhs.dtype)
    params = _conv_params(op, split)
    windows: list[Window] = []
    for i, j, k, window in _conv_windows(op):
        axes, kernel = split.ins[0].dims[i], split.ins[1].dims[j]
        if not axes or window.trivial:
            windows.append(window)
            continue
        index = np.arange(b.mesh.size(axes))
        taps = rhs.shape[j]
        if kernel:
            rhs = b.mask(rhs, j, kernel, op.ins[1].shape[j], "sum")
        count = split.out_shapes[0][k]
        first = index * taps * window.dilation if kernel else index * count * window.stride
        size = (count - 1) * window.stride + window.reach(taps)
        n = op.ins[0].shape[i]
        lhs, window = _fetched(b, lhs, zero, i, n, window, axes, first - window.low, size)
        windows.append(window)
    params["padding"] = tuple((w.low, w.high) for w in windows)
    params["lhs_dilation"] = tuple(w.base for w in windows)
    assert op.call is not None
    out = (split.out_shapes[0], op.outs[0].dtype)
    return b.local("conv_general_dilated", op.call, [lhs, rhs], [out], **params)


def _conv_product(op: Op) -> Product:
    """As the product of patches and kernel; the zeros that dilation puts in are not multiplied."""
    rhs, out = op.ins[1].shape, op.outs[0].shape
    _, (o, _), (_, p) = (spec[:2] for spec in op.params["dimension_numbers"])
    groups = op.params["feature_group_count"] * op.params["batch_group_count"]
    zeros = math.prod(op.params["lhs_dilation"])
    return Product(
        groups,
        math.prod(out) // out[p],
        rhs[o] // groups,
        max(1, math.prod(rhs) // rhs[o] // zeros),
    )


@rule("conv_general_dilated", params=_conv_params, partition=_conv_partition, product=_conv_product)
def conv_general_dilated(op: Op) -> FactorRule:
    """Batch, groups and output features pass, input features are summed, spatial dims exchanged.

    With n groups of features, c and o are those of one group: `(n c), (n o) c -> (n o)`.
    """
    (lhs, rhs), (out,) = op.ins, op.outs
    (n, c), (o, i), (m, p) = (spec[:2] for spec in op.params["dimension_numbers"])
    groups, batches = op.params["feature_group_count"], op.params["batch_group_count"]
    f = Factors()
    left, right, result = (dict[int, tuple[int, ...]]() for _ in range(3))
    group = (f.new(groups),) if groups > 1 else (f.new(batches),) if batches > 1 else ()
    batch = f.new(out.shape[m])
    left[n] = (*group, batch) if batches > 1 else (batch,)
    result[m] = (batch,)
    summed = f.new(rhs.shape[i], "sum")
    left[c] = (*group, summed) if groups > 1 else (summed,)
    right[i] = (summed,)
    count = groups * batches
    right[o] = result[p] = (*group, f.new(rhs.shape[o] // count))
    for d, e, g, window in _conv_windows(op):
        inside = rhs.shape[e] > out.shape[g]  # the window is the large one: its taps are shared out
        kind = "sum" if inside else "pass"
        spatial = (f.new(lhs.shape[d], kind, exchanged=not window.trivial),)
        left[d] = spatial
        right[e] = spatial if inside else (f.new(rhs.shape[e], "whole"),)
        result[g] = (f.new(out.shape[g], "whole"),) if inside else spatial
    ins = [_in_order(left), _in_order(right)]
    return f.rule(ins, [_in_order(result)], linear=bilinear(op), forward=1, backward=1)


def _in_order(factors: dict[int, tuple[int, ...]]) -> Dims:
    return tuple(factors[d] for d in range(len(factors)))


# --- pooling


def _windows(op: Op) -> Iterator[Window]:
    params = op.params
    sizes = params["window_dimensions"]
    ones = (1,) * len(sizes)
    rows = zip(
        sizes, params["window_strides"], params.get("window_dilation", ones),
        params.get("base_dilation", ones), params["padding"], strict=True,
    )  # fmt: skip
    for size, stride, dilation, base, (low, high) in rows:
        yield Window(size, stride, dilation, base, low, high)


FILLERS = {"reduce_window_sum": "sum", "reduce_window_max": "max", "reduce_window_min": "min"}


def _pool_partition(b: Builder, op: Op, split: Split, ins: Sequence[Operand]) -> Sequence[Value]:
    """All operands are windowed alike; of a user's reduction the second half are its fillers."""
    kind = FILLERS.get(op.name)
    operands = [value(x) for x in ins[: len(op.outs)]]
    fillers = ins[len(op.outs) :] or [
        Literal(neutral_value(kind or "sum", x.dtype)[()], x.dtype) for x in operands
    ]
    windows = list(_windows(op))
    for d, axes in enumerate(split.outs[0].dims):
        window = windows[d]
        if not axes or window.trivial:
            continue
        count, n = split.out_shapes[0][d], op.ins[0].shape[d]
        start = np.arange(b.mesh.size(axes)) * count * window.stride - window.low
        size = (count - 1) * window.stride + window.reach(window.size)
        for i, filler in enumerate(fillers):
            x = operands[i]
            operands[i], windows[d] = _fetched(b, x, filler, d, n, window, axes, start, size)
    params = dict(op.params) | {"padding": tuple((w.low, w.high) for w in windows)}
    if "base_dilation" in params:
        params["base_dilation"] = tuple(w.base for w in windows)
    assert op.call is not None
    outs = [(shape, x.dtype) for shape, x in zip(split.out_shapes, op.outs, strict=True)]
    return b.local(op.name, op.call, [*operands, *ins[len(op.outs) :]], outs, **params)


def _pooled(op: Op, linear: tuple[tuple[int, ...], ...] = ()) -> FactorRule:
    f = Factors()
    dims: Dims = tuple(
        (f.new(n, exchanged=not window.trivial),)
        for n, window in zip(op.ins[0].shape, _windows(op), strict=True)
    )
    ins = [dims if x.shape else () for x in op.ins]
    return f.rule(ins, [dims] * len(op.outs), linear=linear, forward=1, backward=1)


@rule("reduce_window", "reduce_window_max", "reduce_window_min", partition=_pool_partition)
def pool(op: Op) -> FactorRule:
    return _pooled(op)


@rule("reduce_window_sum", partition=_pool_partition)
def linear_pool(op: Op) -> FactorRule:
    return _pooled(op, linear=((0,),))


def _unpool_partition(b: Builder, op: Op, split: Split, ins: Sequence[Operand]) -> Sequence[Value]:
    """Each device takes the windows that reach into its block, with all that they reach."""
    source, operand = map(value, ins)
    kind = "max" if op.params["select_prim"].name == "ge" else "min"
    lowest = Literal(neutral_value(kind, operand.dtype)[()], operand.dtype)
    zero = Literal(np.zeros((), source.dtype)[()], source.dtype)
    padding = list(op.params["padding"])
    crops: list[tuple[int, tuple[str, ...], np.ndarray, int]] = []
    for d, (axes, window) in enumerate(zip(split.outs[0].dims, _windows(op), strict=True)):
        if not axes or window.trivial:
            continue
        group, block = b.mesh.size(axes), split.out_shapes[0][d]
        begin = np.arange(group) * block
        first = -(-(begin + window.low - window.size + 1) // window.stride)
        last = (begin + block - 1 + window.low) // window.stride
        count = max(1, int(np.max(last - first)) + 1)
        size = (count - 1) * window.stride + window.size
        start = first * window.stride - window.low
        have = Runs.blocks(op.ins[0].shape[d], group)
        want = Runs.of(first, first + count)
        source = b.exchange([(source, have, (want,))], d, axes, count, zero)
        have, want = Runs.blocks(op.ins[1].shape[d], group), Runs.of(start, start + size)
        operand = b.exchange([(operand, have, (want,))], d, axes, size, lowest)
        padding[d] = (0, 0)
        crops.append((d, axes, begin - start, block))
    params = dict(op.params) | {"padding": tuple(padding)}
    assert op.call is not None
    shape = list(split.out_shapes[0])
    for d, *_ in crops:
        shape[d] = operand.shape[d]
    (x,) = b.local(op.name, op.call, [source, operand], [(tuple(shape), source.dtype)], **params)
    for d, axes, at, size in crops:
        how = {"dim": d, "axes": axes, "at": tuple(at.tolist()), "size": size}
        (x,) = b.local("crop", _crop, [x], [(resized(x, d, size), x.dtype)], **how)
    return [x]


def _crop(x: Any, *, dim: int, axes: Any, at: tuple[int, ...], size: int) -> Any:
    """This device's `size` entries of a dim from index `at[device]` on, zeros beyond its ends."""
    low, high = max(0, -min(at)), max(0, max(at) + size - x.shape[dim])
    widths = [(0, 0, 0)] * x.ndim
    widths[dim] = (low, high, 0)
    start = mine([i + low for i in at], axes)
    return lax.dynamic_slice_in_dim(lax.pad(x, np.zeros((), x.dtype), widths), start, size, dim)


@rule("select_and_scatter_add", partition=_unpool_partition)
def select_and_scatter_add(op: Op) -> FactorRule:
    """The gradient of max pooling: `source` counts the windows, `operand` the entries."""
    f = Factors()
    dims: Dims = tuple(
        (f.new(n, exchanged=not window.trivial),)
        for n, window in zip(op.ins[1].shape, _windows(op), strict=True)
    )
    return f.rule([dims, dims], [dims], linear=((0,),), forward=1, backward=1)


@rule("select_and_scatter", "select_and_gather_add")
def whole_windows(op: Op) -> FactorRule:
    """Dims with trivial windows pass, the others stay whole."""
    f = Factors()
    shared = [
        f.new(n) if w.trivial else None for n, w in zip(op.ins[0].shape, _windows(op), strict=True)
    ]

    def dims(shape: Sequence[int]) -> Dims:
        sizes = zip(shape, shared, strict=True)
        return tuple((f.new(n, "whole") if factor is None else factor,) for n, factor in sizes)

    ins = [dims(x.shape) if x.shape else () for x in op.ins]
    return f.rule(ins, [dims(x.shape) for x in op.outs], forward=1, backward=1)
