"""The rules of scatter: each device applies the updates that fall into its shard.

Updates whose order does not matter may be shared out as well: then the results of the devices are
combined as the updates are. Updates that replace what was there cannot: which device holds the
last one would have to be sent along, and gathering the updates costs no more than that.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from gspmd.ir import Op
from gspmd.local import neutral_value
from gspmd.rules.factor import FactorRule, Factors, Split, rule
from gspmd.rules.index import DROP, Indexing, Localized, sum_kind
from gspmd.sharding import Axes

UPDATE_KINDS = {
    "scatter-add": "sum",
    "scatter-sub": "sum",
    "scatter-mul": "prod",
    "scatter-max": "max",
    "scatter-min": "min",
}
LINEAR = {"scatter-add": ((0, 2),), "scatter-sub": ((0, 2),), "scatter-mul": ((0,),)}


def _call(op: Op, split: Split) -> Callable[..., Any]:
    assert op.call is not None
    call, params = op.call, dict(op.params)
    at = Localized.of(Indexing.of_scatter(op), split.ins[0].dims, split.in_shapes[0])
    shared = _shared_axes(op, split)
    kind = UPDATE_KINDS.get(op.name, "")
    clamp = op.params["mode"] == lax.GatherScatterMode.CLIP
    if shared:  # padding repeats an index, with an update that changes nothing
        params |= {"unique_indices": False, "indices_are_sorted": False}
    if at.cut:
        numbers = op.params["dimension_numbers"]
        params |= {
            "dimension_numbers": numbers._replace(
                update_window_dims=at.windows,
                inserted_window_dims=at.collapsed,
                scatter_dims_to_operand_dims=at.indexed,
                scatter_indices_batching_dims=at.batching,
            ),
            "indices_are_sorted": False,
            "mode": DROP,
        }

    def local(operand: Any, indices: Any, updates: Any, **_: Any) -> Any:
        if shared and kind in ("sum", "prod"):  # what was there counts once
            first = lax.axis_index(shared) == 0
            operand = jnp.where(first, operand, neutral_value(kind, operand.dtype))
        if at.cut:
            indices, own, valid = at.translate(indices)
            kept = own if clamp else own & valid
            indices = jnp.where(kept[..., None], indices, -1)
        return call(operand, indices, updates, **params)

    return local


def _shared_axes(op: Op, split: Split) -> Axes:
    """The axes over which the devices share out the updates."""
    batching = op.params["dimension_numbers"].scatter_indices_batching_dims
    dims = split.ins[1].dims[:-1]
    return tuple(axis for d, axes in enumerate(dims) if d not in batching for axis in axes)


@rule(
    "scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-max", "scatter-min",
    call=_call,
)  # fmt: skip
def scatter(op: Op) -> FactorRule:
    """All dims of the operand pass; of the updates, those that cover a dim of it in full."""
    f = Factors()
    at = Indexing.of_scatter(op)
    # XLA applies only the last update where index vectors are empty.
    kinds = ("pass", _update_kind(op)) if at.indexed else ("whole", "whole")
    operand, indices, updates = at.dims(f, op.ins[1].shape, *kinds)
    return f.rule(
        [operand, indices, updates],
        [operand],
        copied=frozenset(d for (d,) in indices[:-1] if f.kinds[d] == "whole"),
        linear=LINEAR.get(op.name, ()),
        forward=1,
        backward=1,
    )


def _update_kind(op: Op) -> str:
    kind = UPDATE_KINDS.get(op.name, "whole")
    countable = kind not in ("sum", "prod") or sum_kind(op.ins[0].dtype) == "sum"
    return kind if countable else "whole"
