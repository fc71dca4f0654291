"""What a loop sends in every step although it stays the same is sent once, before the loop.

%1 = scan[length=8] w, %0                          #1 %1 = all_gather[x] w
  body (%2: f32[8@x], %3: f32[4])            ->    %2 = scan[length=8] w, %1, %0
    #1 %4: f32[8] = all_gather[x] %2                 body (%3: f32[8@x], %4: f32[8], %5: f32[4])
    ...                                                ...
"""

import dataclasses
import itertools
from types import MappingProxyType

from gspmd.ir import COLLECTIVES, Op, Operand, Program, Value, bytes_of, next_id, values_of
from gspmd.optimize.share import is_pure
from gspmd.sharding import Mesh

ROOM = 1 << 26
"""Bytes per device by which one loop may grow what it holds. Weights that are gathered layer by
layer, or in each microbatch, are mostly so for want of memory: those of a large model stay inside.
"""


def hoist(program: Program, mesh: Mesh) -> Program:
    """Moves collectives of loop constants out of scans, innermost first.

    A scan that may run no step at all keeps them, and so does one that would hold `ROOM` bytes more
    for the results than for the operands.
    """
    return _hoisted(program, itertools.count(next_id(program)))


def _hoisted(program: Program, ids: "itertools.count[int]") -> Program:
    ops: list[Op] = []
    for op in program.ops:
        if op.bodies:
            op = dataclasses.replace(op, bodies=tuple(_hoisted(body, ids) for body in op.bodies))
        if op.name == "scan" and op.params["length"] > 1:
            before, op = _parted(op, ids)
            ops += before
        ops.append(op)
    return dataclasses.replace(program, ops=tuple(ops))


def _parted(scan: Op, ids: "itertools.count[int]") -> tuple[list[Op], Op]:
    """What goes before a scan, and the scan that is left, with the results as more constants."""
    (body,) = scan.bodies
    count = scan.params["num_consts"]
    outer: dict[Value, Operand] = dict(zip(body.ins[:count], scan.ins[:count], strict=True))
    constant = _constant(body, outer)
    leaving = _affordable([op for op in constant if op.name in COLLECTIVES])
    if not leaving:
        return [], scan
    before: list[Op] = []
    for op in _needed(leaving, constant):  # what only leads to a collective is computed twice
        outs = tuple(dataclasses.replace(x, id=next(ids)) for x in op.outs)
        ins = tuple(outer[x] if isinstance(x, Value) else x for x in op.ins)
        before.append(dataclasses.replace(op, ins=ins, outs=outs))
        outer.update(zip(op.outs, outs, strict=True))
    made = tuple(x for op in leaving for x in op.outs)
    rest = tuple(op for op in body.ops if op not in leaving)
    inside = dataclasses.replace(body, ins=(*body.ins[:count], *made, *body.ins[count:]), ops=rest)
    ins = (*scan.ins[:count], *(outer[x] for x in made), *scan.ins[count:])
    params = MappingProxyType({**scan.params, "num_consts": count + len(made)})
    return before, dataclasses.replace(scan, ins=ins, params=params, bodies=(inside,))


def _constant(body: Program, consts: dict[Value, Operand]) -> list[Op]:
    """The ops of a body that compute the same in every step."""
    known = set(consts)
    found: list[Op] = []
    for op in body.ops:
        if not op.bodies and is_pure(op) and known.issuperset(values_of(op.ins)):
            found.append(op)
            known.update(op.outs)
    return found


def _affordable(collectives: list[Op]) -> list[Op]:
    """Those that fit in the room together, in order."""
    found: list[Op] = []
    room = float(ROOM)
    for op in collectives:
        growth = bytes_of(op.outs) - bytes_of(op.ins)
        if growth <= room:
            room -= max(0.0, growth)
            found.append(op)
    return found


def _needed(leaving: list[Op], constant: list[Op]) -> list[Op]:
    """The ops that leave, and those that they depend on, in order."""
    wanted = {x for op in leaving for x in op.outs}
    found: list[Op] = []
    for op in reversed(constant):
        if wanted.intersection(op.outs):
            wanted.update(values_of(op.ins))
            found.append(op)
    return found[::-1]
