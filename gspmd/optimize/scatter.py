"""A reduction of which each device keeps its block only is a reduce_scatter: half the bytes.

#1 %0: f32[8] = all_reduce[x] %p
%1: f32[8@x] = shard[axes=x dim=0] %0    ->    #1 %1: f32[8@x] = reduce_scatter[x][dim=0] %p
"""

import collections
import dataclasses
from types import MappingProxyType

from gspmd.ir import Op, Program, Value, values_of
from gspmd.sharding import Mesh


def scatter(program: Program, mesh: Mesh) -> Program:
    """Fuses each all_reduce whose only use is an even `shard` along the same axes."""
    uses: collections.Counter[Value] = collections.Counter(values_of(program.outs))
    for op in program.ops:
        uses.update(values_of(op.ins))
    reductions: dict[Value, Op] = {}
    replaced: set[Op] = set()
    ops: list[Op] = []
    for op in program.ops:
        if op.bodies:
            op = dataclasses.replace(op, bodies=tuple(scatter(body, mesh) for body in op.bodies))
        elif op.name == "all_reduce" and len(op.ins) == 1 and op.params["reduction"] == "sum":
            reductions[op.outs[0]] = op
        elif op.name == "shard" and op.ins[0] in reductions:
            reduction = reductions[op.ins[0]]
            if uses[reduction.outs[0]] == 1 and _same_block(op, reduction, mesh):
                replaced.add(reduction)
                params = {"axes": op.params["axes"], "dim": op.params["dim"], "reduction": "sum"}
                op = dataclasses.replace(
                    reduction,
                    name="reduce_scatter",
                    outs=op.outs,
                    params=MappingProxyType(params),
                    cause=op.cause or reduction.cause,
                )
        ops.append(op)
    return dataclasses.replace(program, ops=tuple(op for op in ops if op not in replaced))


def _same_block(shard: Op, reduction: Op, mesh: Mesh) -> bool:
    axes = shard.params["axes"]
    return axes == reduction.params["axes"] and shard.params["size"] % mesh.size(axes) == 0
