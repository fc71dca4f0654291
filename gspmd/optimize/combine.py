"""Small reductions over the same axes travel together: one message instead of several.

#1 %1 = all_reduce[x] %0
#2 %3 = all_reduce[x] %2    ->    #1 %1, %3 = all_reduce[x] %0, %2
%4 = add %1, %3                   %4 = add %1, %3
"""

import dataclasses

from gspmd.ir import Op, Program, Value, bytes_of, values_of
from gspmd.sharding import Axes, Mesh

SMALL = 1 << 20
"""Bytes per device up to which the latency of a reduction counts for more than its bytes."""


@dataclasses.dataclass
class _Group:
    """Reductions that go out together, at position `at` of the program; -1 until one is used."""

    ops: list[Op]
    at: int = -1


def combine(program: Program, mesh: Mesh) -> Program:
    """Merges independent small all_reduces of equal axes, reduction and dtype.

    Each waits until a result of its group is first used; then the group goes out as one. One that
    comes later still joins if its operand was there by then.
    """
    groups: dict[tuple[Axes, str, str], _Group] = {}
    waiting: dict[Value, _Group] = {}
    born: dict[Value, int] = {}
    ops: list[Op | _Group] = []

    def send(group: _Group) -> None:
        group.at = len(ops)
        ops.append(group)
        for out in (out for op in group.ops for out in op.outs):
            born[out] = group.at
            del waiting[out]

    for op in program.ops:
        for x in values_of(op.ins):
            if x in waiting:
                send(waiting[x])
        if op.bodies:
            op = dataclasses.replace(op, bodies=tuple(combine(body, mesh) for body in op.bodies))
        if op.name != "all_reduce" or bytes_of(op.ins) > SMALL:
            born.update(dict.fromkeys(op.outs, len(ops)))
            ops.append(op)
            continue
        key = (op.params["axes"], op.params["reduction"], str(op.outs[0].dtype))
        group = groups.get(key)
        ready = max((born.get(x, -1) for x in values_of(op.ins)), default=-1)
        if group is None or 0 <= group.at <= ready:
            group = groups[key] = _Group([])
        group.ops.append(op)
        if group.at < 0:
            waiting.update(dict.fromkeys(op.outs, group))
        else:
            born.update(dict.fromkeys(op.outs, group.at))
    for group in groups.values():
        if group.at < 0:
            send(group)
    merged = (_merged(op.ops) if isinstance(op, _Group) else op for op in ops)
    return dataclasses.replace(program, ops=tuple(merged))


def _merged(group: list[Op]) -> Op:
    if len(group) == 1:
        return group[0]
    return dataclasses.replace(
        max(group, key=lambda op: bytes_of(op.ins)),
        ins=tuple(x for op in group for x in op.ins),
        outs=tuple(x for op in group for x in op.outs),
        parts=tuple(part for op in group for part in op.parts or (op,)),
    )
