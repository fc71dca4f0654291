"""What a loop sends in every step although it stays the same is sent once, before the loop.

%1 = scan[length=8] w, %0                          #1 %1 = all_gather[x] w
  body (%2: f32[8@x], %3: f32[4])            ->    %2 = scan[length=8] w, %1, %0
    #1 %4: f32[8] = all_gather[x] %2                 body (%3: f32[8@x], %4: f32[8], %5: f32[4])
    ...                                                ...

With a given room it works the other way, too: what does not fit there while the loop runs enters.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from gspmd.ir import (
    COLLECTIVES,
    Op,
    Operand,
    Program,
    Value,
    bytes_of,
    leading_to,
    next_id,
    values_of,
)
from gspmd.optimize.share import is_pure
from gspmd.options import ROOM
from gspmd.sharding import Mesh

Copy = list[Op]  # a collective, and what is made of it


def hoist(program: Program, mesh: Mesh, room: int | None = None) -> Program:
    """Moves collectives of loop constants out of scans, innermost first, while they fit in `room`.

    A scan that may run no step at all keeps them, and so does one that would hold `room` bytes more
    for the results than for the operands; `ROOM` if it is None.

    Given a room, gathers before a scan that only serve it share that room, and those that do not
    fit enter the scan, outermost first: a scan of n steps then sends n times their bytes.
    """
    ids = itertools.count(next_id(program))
    if room is None:
        return _hoisted(program, ids, None)
    return _hoisted(_entered(program, ids, room), ids, room)


def _hoisted(program: Program, ids: "itertools.count[int]", room: int | None) -> Program:
    copies = _copies(program) if room is not None else {}
    ops: list[Op] = []
    for op in program.ops:
        if op.bodies:
            bodies = tuple(_hoisted(body, ids, room) for body in op.bodies)
            op = dataclasses.replace(op, bodies=bodies)
        if _is_loop(op):
            held = sum(max(0.0, _growth(copy)) for copy in _held(op, copies))
            free = ROOM if room is None else room - held
            before, op = _parted(op, ids, free)
            ops += before
        ops.append(op)
    return dataclasses.replace(program, ops=tuple(ops))


def _is_loop(op: Op) -> bool:
    return op.name == "scan" and op.params["length"] > 1


def _parted(scan: Op, ids: "itertools.count[int]", room: float) -> tuple[list[Op], Op]:
    """What goes before a scan, and the scan that is left, with the results as more constants."""
    (body,) = scan.bodies
    count = scan.params["num_consts"]
    outer: dict[Value, Operand] = dict(zip(body.ins[:count], scan.ins[:count], strict=True))
    constant = _constant(body, outer)
    collectives = [[op] for op in constant if op.name in COLLECTIVES]
    leaving = [op for (op,) in _affordable(collectives, room)]
    if not leaving:
        return [], scan
    before: list[Op] = []
    for op in leading_to(leaving, constant):  # what only leads to a collective is computed twice
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


def _affordable(copies: Iterable[Copy], room: float) -> list[Copy]:
    """Those that fit in the room together, in order."""
    found: list[Copy] = []
    for copy in copies:
        growth = _growth(copy)
        if growth <= room:
            room -= max(0.0, growth)
            found.append(copy)
    return found


def _growth(copy: Copy) -> float:
    return bytes_of(copy[-1].outs) - bytes_of(copy[0].ins)


def _copies(program: Program) -> Mapping[Value, Copy]:
    """What serves one op alone and comes of a gather: the gather, and what is made of it."""
    readers = collections.Counter(x for op in program.ops for x in values_of(op.ins))
    readers.update(values_of(program.outs))
    found: dict[Value, Copy] = {}
    for op in program.ops:
        xs = values_of(op.ins)
        if len(op.outs) != 1 or len(op.ins) != 1 or op.bodies or not is_pure(op):
            continue
        if op.name == "all_gather":
            found[op.outs[0]] = [op]
        elif xs and xs[0] in found and readers[xs[0]] == 1:
            found[op.outs[0]] = [*found[xs[0]], op]
    return {x: copy for x, copy in found.items() if readers[x] == 1}


def _held(scan: Op, copies: Mapping[Value, Copy]) -> list[Copy]:
    """The copies among the constants of a scan."""
    consts = scan.ins[: scan.params["num_consts"]]
    return [copies[x] for x in values_of(consts) if x in copies]


def _entered(program: Program, ids: "itertools.count[int]", room: int) -> Program:
    """The program whose loops make what they have no room for themselves, outermost first."""
    copies = _copies(program)
    gone: set[Op] = set()
    ops: list[Op] = []
    for op in program.ops:
        if _is_loop(op):
            held = _held(op, copies)
            fits = _affordable(held, room)
            for copy in held:
                if copy not in fits:
                    gone.update(copy)
                    op = _with_inside(op, copy, ids)
        if op.bodies:
            bodies = tuple(_entered(body, ids, room) for body in op.bodies)
            op = dataclasses.replace(op, bodies=bodies)
        ops.append(op)
    return dataclasses.replace(program, ops=tuple(op for op in ops if op not in gone))


def _with_inside(scan: Op, copy: Copy, ids: "itertools.count[int]") -> Op:
    """A scan that makes the constant `copy` itself, from the operand of its gather."""
    (body,) = scan.bodies
    at = scan.ins.index(copy[-1].outs[0])
    (source,) = values_of(copy[0].ins)
    x = first = dataclasses.replace(source, id=next(ids), name="")
    inside: list[Op] = []
    for op in copy:
        out = body.ins[at] if op is copy[-1] else dataclasses.replace(op.outs[0], id=next(ids))
        inside.append(dataclasses.replace(op, ins=(x,), outs=(out,)))
        x = out
    ins = (*body.ins[:at], first, *body.ins[at + 1 :])
    body = dataclasses.replace(body, ins=ins, ops=(*inside, *body.ops))
    outer = (*scan.ins[:at], source, *scan.ins[at + 1 :])
    return dataclasses.replace(scan, ins=outer, bodies=(body,))
