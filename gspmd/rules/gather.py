"""The rule of gather. Rows that another device holds are zeros, and the true rows a sum."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from gspmd.ir import Op
from gspmd.rules.factor import FactorRule, Factors, Split, rule
from gspmd.rules.index import DROP, Indexing, Localized, sum_kind, zeros_but


def _params(op: Op, split: Split) -> dict[str, Any]:
    """Slices that take a dim in full now take the shard in full."""
    indexing = Indexing.of_gather(op)
    sizes = tuple(
        split.in_shapes[0][d] if indexing.full(d) else size for d, size in enumerate(indexing.sizes)
    )
    return {**op.params, "slice_sizes": sizes}


def _call(op: Op, split: Split) -> Callable[..., Any]:
    assert op.call is not None
    call, params = op.call, _params(op, split)
    at = Localized.of(Indexing.of_gather(op), split.ins[0].dims, split.in_shapes[0])
    if not at.cut:
        return functools.partial(call, **params)
    fill = op.params["mode"] == DROP
    numbers = op.params["dimension_numbers"]
    params |= {
        "dimension_numbers": numbers._replace(
            offset_dims=at.windows,
            collapsed_slice_dims=at.collapsed,
            start_index_map=at.indexed,
            start_indices_batching_dims=at.batching,
        ),
        "slice_sizes": at.sizes(params["slice_sizes"]),
        "unique_indices": False,
        "indices_are_sorted": False,
    }

    def local(operand: Any, indices: Any, **_: Any) -> Any:
        indices, own, valid = at.translate(indices)
        if fill:  # the owner of the clamped row fills
            indices = jnp.where(valid[..., None], indices, -1)
        out = call(operand, indices, **params)
        named = tuple(p for p in range(out.ndim) if p not in at.windows)
        return zeros_but(lax.broadcast_in_dim(own, out.shape, named), out)

    return local


@rule("gather", params=_params, call=_call, picks=True)
def gather(op: Op) -> FactorRule:
    """Dims taken in full pass, and dims of the indices; other dims of the operand are summed."""
    f = Factors()
    kind = sum_kind(op.ins[0].dtype)
    operand, indices, out = Indexing.of_gather(op).dims(f, op.ins[1].shape, kind, "pass")
    return f.rule(
        [operand, indices],
        [out],
        linear=((0,),) if _fills_linearly(op) else (),
        forward=1,
        backward=1,
        masked=False,
    )


def _fills_linearly(op: Op) -> bool:
    """Whether rows out of bounds are zero, or NaN, which sums to NaN again."""
    fill = op.params["fill_value"]
    return op.params["mode"] != DROP or fill == 0 or fill != fill
