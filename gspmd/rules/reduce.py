"""Rules of reductions, cumulative reductions and windowed reductions."""

from collections.abc import Sequence

from gspmd.ir import Op
from gspmd.rules.factor import Dims, FactorRule, Factors, rule

KINDS = {
    "reduce_sum": "sum",
    "reduce_max": "max",
    "reduce_min": "min",
    "reduce_prod": "prod",
    "reduce_and": "and",
    "reduce_or": "or",
    "reduce_xor": "xor",
}


def _reduced(op: Op, dims: Sequence[int], kind: str, linear: bool = False) -> FactorRule:
    """All full operands and all results split alike; `dims` of the operands are of `kind`."""
    f = Factors()
    shape = op.ins[0].shape
    factors: Dims = tuple((f.new(n, kind if d in dims else "pass"),) for d, n in enumerate(shape))
    kept = tuple(factor for d, factor in enumerate(factors) if d not in dims)
    return f.rule(
        [factors if x.shape == shape else () for x in op.ins],
        [kept] * len(op.outs),
        linear=((0,),) if linear else (),
        forward=1,
        backward=1,
    )


@rule("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or")
@rule("reduce_xor")
def reduction(op: Op) -> FactorRule:
    return _reduced(op, op.params["axes"], KINDS[op.name], linear=op.name == "reduce_sum")


@rule("argmax", "argmin")
def arg_reduction(op: Op) -> FactorRule:
    return _reduced(op, op.params["axes"], "whole")


@rule("reduce")
def reduce(op: Op) -> FactorRule:
    """n operands, then n initial scalars; the user's function reduces whole dims."""
    return _reduced(op, op.params["dimensions"], "whole")


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def cumulative(op: Op) -> FactorRule:
    axis = op.params["axis"]
    f = Factors()
    dims: Dims = tuple(
        (f.new(n, "whole" if d == axis else "pass"),) for d, n in enumerate(op.ins[0].shape)
    )
    linear = ((0,),) if op.name == "cumsum" else ()
    return f.rule([dims], [dims], linear=linear, forward=1, backward=1)


def _windowed(op: Op, linear: tuple[tuple[int, ...], ...] = ()) -> FactorRule:
    """Dims that the window only ever sees one position of pass; the others stay whole."""
    params = op.params
    window = params["window_dimensions"]
    ones = (1,) * len(window)
    base, dilation = params.get("base_dilation", ones), params.get("window_dilation", ones)
    trivial = [
        all(x == 1 for x in sizes) and tuple(padding) == (0, 0)
        for *sizes, padding in zip(
            window, params["window_strides"], base, dilation, params["padding"], strict=True
        )
    ]
    f = Factors()
    shape = op.ins[0].shape
    shared = [f.new(n) if passes else None for n, passes in zip(shape, trivial, strict=True)]

    def dims(shape: tuple[int, ...]) -> Dims:
        return tuple(
            (f.new(n, "whole") if factor is None else factor,)
            for n, factor in zip(shape, shared, strict=True)
        )

    return f.rule(
        [dims(x.shape) if x.shape else () for x in op.ins],
        [dims(x.shape) for x in op.outs],
        linear=linear,
        forward=1,
        backward=1,
    )


@rule("reduce_window", "reduce_window_max", "reduce_window_min", "select_and_gather_add")
@rule("select_and_scatter")
def windowed(op: Op) -> FactorRule:
    return _windowed(op)


@rule("reduce_window_sum", "select_and_scatter_add")
def linear_windowed(op: Op) -> FactorRule:
    return _windowed(op, linear=((0,),))
