"""Small reductions over the same axes travel together: one message instead of several.

#1 %1 = all_reduce[x] %0
#2 %3 = all_reduce[x] %2    ->    #1 %1, %3 = all_reduce[x] %0, %2
%4 = add %1, %3                   %4 = add %1, %3
"""

import dataclasses
import math

from gspmd.ir import Op, Program, Value, values_of
from gspmd.sharding import Axes, Mesh, itemsize

SMALL = 1 << 20
"""Bytes per device up to which the latency of a reduction counts for more than its bytes."""


def combine(program: Program, mesh: Mesh) -> Program:
    """Merges independent small all_reduces of equal axes, reduction and dtype.

    Each waits until a result of its group is first used; then the group goes out as one.
    """
    waiting: dict[tuple[Axes, str, str], list[Op]] = {}
    group_of: dict[Value, tuple[Axes, str, str]] = {}
    ops: list[Op] = []

    def send(key: tuple[Axes, str, str]) -> None:
        group = waiting.pop(key)
        for out in (out for op in group for out in op.outs):
            del group_of[out]
        ops.append(_merged(group))

    for op in program.ops:
        for x in values_of(op.ins):
            if x in group_of:
                send(group_of[x])
        if op.bodies:
            op = dataclasses.replace(op, bodies=tuple(combine(body, mesh) for body in op.bodies))
        if op.name == "all_reduce" and _bytes(op) <= SMALL:
            key = (op.params["axes"], op.params["reduction"], str(op.outs[0].dtype))
            waiting.setdefault(key, []).append(op)
            group_of.update(dict.fromkeys(op.outs, key))
        else:
            ops.append(op)
    for key in list(waiting):
        send(key)
    return dataclasses.replace(program, ops=tuple(ops))


def _bytes(op: Op) -> float:
    return sum(math.prod(x.shape) * itemsize(x.dtype) for x in op.ins)


def _merged(group: list[Op]) -> Op:
    if len(group) == 1:
        return group[0]
    return dataclasses.replace(
        max(group, key=_bytes),
        ins=tuple(x for op in group for x in op.ins),
        outs=tuple(x for op in group for x in op.outs),
    )
