"""Manual regions: what the user's own collectives are, inside a `shard_map` of a global program.

There a program is written for one device's shards along some mesh axes, the manual ones, and for
whole arrays along the others, which the partitioner may still use. A collective over manual axes
is an op like any other: it has dims that pass and dims that it needs whole.
"""

import dataclasses
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gspmd.ir import COLLECTIVES, Op, Program
from gspmd.rules.factor import FactorRule, Factors, rule
from gspmd.sharding import Axes, Mesh

OVER_AXES = (*COLLECTIVES, "axis_index", "from_source")


def axis_index(*, axes: Axes) -> jax.Array:
    """Which device this is along `axes`, the first of which is major."""
    return lax.axis_index(axes)


def from_source(x: jax.Array, *, axes: Axes, source: int) -> jax.Array:
    """`x` on the device with index `source` along `axes`, zeros on the others."""
    return jnp.where(lax.axis_index(axes) == source, x, np.zeros((), x.dtype))


@rule("axis_index")
def index_of_device(op: Op) -> FactorRule:
    return Factors().rule([], [()])


@rule("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "collective_permute")
def collective(op: Op) -> FactorRule:
    """All dims pass but those along which shards are cut or put together."""
    f = Factors()
    (x,), (out,) = op.ins, op.outs
    cut = {op.params[key] for key in ("dim", "split_dim", "concat_dim") if key in op.params}
    passing = {d: f.new(n) for d, n in enumerate(x.shape) if d not in cut}

    def dims(shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        return tuple((passing[d] if d in passing else f.new(n, "whole"),)
                     for d, n in enumerate(shape))  # fmt: skip

    linear = ((0,),) if op.params.get("reduction", "sum") == "sum" else ()
    return f.rule([dims(x.shape)], [dims(out.shape)], linear=linear)


@rule("from_source")
def of_one(op: Op) -> FactorRule:
    f = Factors()
    dims = f.dims(op.outs[0].shape)
    return f.rule([dims], [dims], linear=((0,),))


def bodies_on(op: Op, mesh: Mesh) -> tuple[Program, ...]:
    """The bodies of a control-flow op; a region's collectives are over the axes of `mesh`.

    The user's axes may be cut there into sub-axes.
    """
    if op.name != "shard_map":
        return op.bodies
    return tuple(_over_axes_of(mesh, body) for body in op.bodies)


def _over_axes_of(mesh: Mesh, body: Program) -> Program:

    def over(op: Op) -> Op:
        params: dict[str, Any] = dict(op.params)
        if op.name in OVER_AXES and not op.bodies:
            params["axes"] = tuple(
                part for axis in params["axes"] for part in mesh.sub_axes(axis) or (axis,)
            )
        if params == op.params and not op.bodies:
            return op
        bodies = tuple(_over_axes_of(mesh, inner) for inner in op.bodies)
        return dataclasses.replace(op, params=MappingProxyType(params), bodies=bodies)

    return dataclasses.replace(body, ops=tuple(map(over, body.ops)))
