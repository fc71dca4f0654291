"""Rules of reductions: over a split dim each device reduces its share, and owes the rest."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gspmd._compat import run_jaxpr
from gspmd.ir import Op, Operand, Value
from gspmd.rules.build import Builder, resized, value
from gspmd.rules.factor import Dims, FactorRule, Factors, Split, rule
from gspmd.sharding import Axes

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


# --- with a user's function


def _reduce_partition(b: Builder, op: Op, split: Split, ins: Sequence[Operand]) -> Sequence[Value]:
    """Folds each dim on each device, then over the devices, and the initial values last.

    These need not be neutral, so they can only be counted once: hence a fold without them.
    """
    count = len(op.outs)
    xs, initial = [value(x) for x in ins[:count]], ins[count:]
    jaxpr = op.params["jaxpr"]
    for d in op.params["dimensions"]:
        axes, n = split.ins[0].dims[d], op.ins[0].shape[d]
        types = [(resized(x, d, 1), x.dtype) for x in xs]
        how = {"dim": d, "axes": axes, "size": n, "jaxpr": jaxpr}
        xs = b.local("fold", _fold, xs, types, **how)
        if axes:
            xs = [b.all_gather(x, axes, d) for x in xs]
            # Of devices beyond the end, which have nothing but padding, nothing is taken.
            held = -(-n // split.in_shapes[0][d])
            xs = b.local("fold", _fold, xs, types, dim=d, axes=(), size=held, jaxpr=jaxpr)
    types = [(split.out_shapes[0], x.dtype) for x in op.outs]
    how = {"dims": tuple(op.params["dimensions"]), "jaxpr": jaxpr}
    return b.local("fold_initial", _fold_initial, [*xs, *initial], types, **how)


def _fold(*xs: Any, dim: int, axes: Axes, size: int, jaxpr: Any) -> list[Any]:
    """The user's function of all entries of `dim`, in order, without those from `size` on.

    Neighbours first, then neighbouring pairs, and so on; an entry without a partner stays. `size`
    counts the entries of all devices along `axes`.
    """
    offset = lax.axis_index(axes) * xs[0].shape[dim] if axes else 0
    held = lax.broadcasted_iota(np.int32, xs[0].shape, dim) + offset < size
    arrays = [*xs, held]
    while (n := arrays[0].shape[dim]) > 1:
        if n % 2:
            arrays = [_with_one_more(x, dim) for x in arrays]
        (*left, mine), (*right, theirs) = (
            [lax.slice_in_dim(x, i, x.shape[dim], 2, dim) for x in arrays] for i in (0, 1)
        )
        both = [
            jnp.where(theirs, new, x)
            for new, x in zip(_apply(jaxpr, left, right), left, strict=True)
        ]
        arrays = [*both, mine]
    return arrays[:-1]


def _with_one_more(x: Any, dim: int) -> Any:
    return lax.pad(x, np.zeros((), x.dtype), [(0, int(d == dim), 0) for d in range(x.ndim)])


def _fold_initial(*xs: Any, dims: tuple[int, ...], jaxpr: Any) -> list[Any]:
    """The initial values, then the folded ones; `dims` of size 1 dropped."""
    folded = [lax.squeeze(x, dims) for x in xs[: len(xs) // 2]]
    initial = xs[len(xs) // 2 :]
    filled = [jnp.broadcast_to(x, y.shape) for x, y in zip(initial, folded, strict=True)]
    return _apply(jaxpr, filled, folded)


def _apply(jaxpr: Any, left: Sequence[Any], right: Sequence[Any]) -> list[Any]:
    """The user's function of scalars, entry by entry."""
    shape = left[0].shape
    found = jax.vmap(functools.partial(run_jaxpr, jaxpr))(*(x.ravel() for x in (*left, *right)))
    return [x.reshape(shape) for x in found]


@rule("reduce", partition=_reduce_partition)
def reduce(op: Op) -> FactorRule:
    """n operands, then n initial scalars."""
    f = Factors()
    dims, shape = op.params["dimensions"], op.ins[0].shape
    empty = any(shape[d] == 0 for d in dims)  # nothing to fold: the initial values are the results
    factors: Dims = tuple(
        (f.new(n, "whole" if d in dims and empty else "pass", d in dims and not empty),)
        for d, n in enumerate(shape)
    )
    kept = tuple(factor for d, factor in enumerate(factors) if d not in dims)
    ins = [factors if i < len(op.outs) else () for i in range(len(op.ins))]
    return f.rule(ins, [kept] * len(op.outs), forward=1, backward=1)
