"""What a rematerialized layer would send a second time is kept from the first, while it fits.

%1, %2 = scan[length=8] %0, w                       %1, %2, %3 = scan[length=8] %0, w
  body (%3, %4)                                       body (%4, %5)
    #1 %5 = all_reduce[x] %4                            #1 %6 = all_reduce[x] %5
    return %6, %3                                       return %7, %4, %6
%7 = scan[length=8] %2, w                     ->    %8 = scan[length=8] %2, w, %3
  body (%8, %9)                                       body (%9, %10, %11)
    %10 = remat %8, %9                                  %12 = remat %9, %10, %11
      body (%11, %12)                                     body (%13, %14, %15)
        #2 %13 = all_reduce[x] %12                          ...
        ...

Gradients of `jax.checkpoint` compute the layers anew, and their collectives with them. A result
that is small for what it took to send, such as the pieces of a scattered sum, is worth keeping: as
one more stacked result of the loop that makes it first, and operand of that which needs it again.
"""

import dataclasses
import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from gspmd.collectives import sent_by
from gspmd.ir import COLLECTIVES, Literal, Op, Operand, Program, Value, bytes_of, next_id
from gspmd.optimize.share import is_pure
from gspmd.sharding import Mesh

Number = int


@dataclasses.dataclass(frozen=True, slots=True)
class Kept:
    """A collective's result `first`, made in one loop, that the loop `again` would make anew.

    `saved` is what it takes to send it, `held` what it takes to keep it, in bytes of all steps.
    """

    loop: Op
    first: Value
    again: Op
    number: Number
    saved: float
    held: float


def keep(program: Program, mesh: Mesh, room: int = 0) -> Program:
    """Stacks results of collectives for the loops that repeat them, at most `room` bytes a device.

    Those are taken first that save most for each byte of room.
    """
    numbers = _Numbers()
    numbers.visit(program, 0)
    found = sorted(_repeated(program, mesh, numbers), key=lambda one: -one.saved / one.held)
    chosen: list[Kept] = []
    for one in found:
        if one.held <= room:
            room -= int(one.held)
            chosen.append(one)
    return _rewritten(program, chosen, numbers) if chosen else program


class _Numbers:
    """Global value numbering: values with one number are equal, in loops for each step.

    Two loops of one length go through the same stacks in step, whichever way they run: the slice of
    a stack in step i is what was put there in step i.
    """

    def __init__(self) -> None:
        self.of: dict[Value, Number] = {}
        self._known: dict[Hashable, Number] = {}
        self._stacked: dict[Number, tuple[int, int, Number]] = {}
        self._ids = itertools.count()

    def visit(self, program: Program, depth: int) -> None:
        """Numbers all that `program` computes, inside of `depth` loops."""
        self._fresh(x for x in program.ins if x not in self.of)
        self._fresh(value for value, _ in program.consts)
        for op in program.ops:
            self._visit_op(op, depth)

    def _visit_op(self, op: Op, depth: int) -> None:
        if op.name == "scan":
            self._visit_scan(op, depth)
        elif op.name == "remat":
            (body,) = op.bodies
            self.of.update(zip(body.ins, map(self.number, op.ins), strict=True))
            self.visit(body, depth)
            self.of.update(zip(op.outs, map(self.number, body.outs), strict=True))
        elif op.bodies or not is_pure(op):
            for body in op.bodies:
                self.visit(body, depth + 1)
            self._fresh(op.outs)
        else:
            operands = tuple(map(self.number, op.ins))
            params = tuple(sorted(op.params.items(), key=lambda item: item[0]))
            for i, out in enumerate(op.outs):
                # What tells a device's shard of an iota from another's is its sharding alone.
                at = None if out.layout is None else (out.layout.shape, out.layout.sharding)
                key = (op.name, operands, params, i, out.shape, out.dtype, at)
                self.of[out] = self._lookup(key)

    def _visit_scan(self, op: Op, depth: int) -> None:
        (body,) = op.bodies
        consts, length = op.params["num_consts"], op.params["length"]
        carries = consts + op.params["num_carry"]
        for i, (x, outer) in enumerate(zip(body.ins, map(self.number, op.ins), strict=True)):
            if i < consts:
                self.of[x] = outer
            elif i >= carries:
                at, steps, inner = self._stacked.get(outer, (-1, -1, -1))
                same = (at, steps) == (depth, length)
                self.of[x] = inner if same else self._lookup(("slice", depth, length, outer))
        self.visit(body, depth + 1)
        self._fresh(op.outs)
        for x, inner in zip(
            op.outs[carries - consts :], body.outs[carries - consts :], strict=True
        ):
            self._stacked[self.of[x]] = (depth, length, self.number(inner))

    def number(self, x: Operand) -> Number:
        if isinstance(x, Literal):
            return self._lookup(("literal", repr(x.value), str(x.dtype)))
        return self.of[x]

    def _lookup(self, key: Hashable) -> Number:
        try:
            return self._known.setdefault(key, next(self._ids))
        except TypeError:  # params that hold arrays or functions by value
            return next(self._ids)

    def _fresh(self, values: Any) -> None:
        self.of.update((x, next(self._ids)) for x in values)


def _repeated(program: Program, mesh: Mesh, numbers: _Numbers) -> Iterator[Kept]:
    """The collectives in loops of `program` that an earlier loop of equal length has made."""
    made: dict[tuple[int, Number], tuple[Op, Value]] = {}
    for op in program.ops:
        if op.name != "scan":
            continue
        length = op.params["length"]
        for one in _in_step(op.bodies[0]):
            if one.name not in COLLECTIVES or len(one.outs) != 1:
                continue
            number = numbers.of[one.outs[0]]
            if (length, number) in made:
                sent = sent_by(one, mesh)
                held = length * bytes_of(one.outs)
                if sent and held:
                    yield Kept(*made[length, number], op, number, length * sent, held)
        for inner in op.bodies[0].ops:
            for x in inner.outs:
                made.setdefault((length, numbers.of[x]), (op, x))


def _in_step(body: Program) -> Iterator[Op]:
    """The ops that run once in a step, those of rematerialized parts too."""
    for op in body.ops:
        yield op
        if op.name == "remat":
            yield from _in_step(op.bodies[0])


def _rewritten(program: Program, chosen: Sequence[Kept], numbers: _Numbers) -> Program:
    ids = itertools.count(next_id(program))
    firsts: dict[Op, dict[Value, Value]] = {}  # by loop: what it keeps, and the stack of it
    agains: dict[
        Op, dict[Number, Value]
    ] = {}  # by loop: what it need not make, and the stack of it
    for one in chosen:
        stacks = firsts.setdefault(one.loop, {})
        if one.first not in stacks:
            shape = (one.loop.params["length"], *one.first.shape)
            stacks[one.first] = Value(next(ids), shape, one.first.dtype)
        agains.setdefault(one.again, {})[one.number] = stacks[one.first]
    ops: list[Op] = []
    for op in program.ops:
        done = _given(op, agains[op], numbers, ids) if op in agains else op
        ops.append(_giving(done, firsts[op]) if op in firsts else done)
    return dataclasses.replace(program, ops=tuple(ops))


def _giving(scan: Op, stacks: Mapping[Value, Value]) -> Op:
    """The loop, with the values of its steps stacked as further results."""
    (body,) = scan.bodies
    body = dataclasses.replace(body, outs=(*body.outs, *stacks))
    return dataclasses.replace(scan, outs=(*scan.outs, *stacks.values()), bodies=(body,))


def _given(
    scan: Op, stacks: Mapping[Number, Value], numbers: _Numbers, ids: "itertools.count[int]"
) -> Op:
    """The loop, with the stacks as further operands in place of what makes their slices anew."""
    slices = {n: Value(next(ids), x.shape[1:], x.dtype) for n, x in stacks.items()}
    body = _without(scan.bodies[0], slices, numbers, ids)
    body = dataclasses.replace(body, ins=(*body.ins, *slices.values()))
    return dataclasses.replace(scan, ins=(*scan.ins, *stacks.values()), bodies=(body,))


def _without(
    body: Program, known: Mapping[Number, Value], numbers: _Numbers, ids: "itertools.count[int]"
) -> Program:
    """The body without the collectives whose numbers are `known`."""
    renamed: dict[Value, Value] = {}
    ops: list[Op] = []

    def new(x: Operand) -> Operand:
        return renamed.get(x, x) if isinstance(x, Value) else x

    for op in body.ops:
        if op.name in COLLECTIVES and len(op.outs) == 1 and numbers.of[op.outs[0]] in known:
            (out,) = op.outs
            renamed[out] = known[numbers.of[out]]
            continue
        op = dataclasses.replace(op, ins=tuple(map(new, op.ins)))
        if op.name == "remat":
            op = _remat_without(op, known, numbers, ids)
        ops.append(op)
    return dataclasses.replace(body, ops=tuple(ops), outs=tuple(map(new, body.outs)))


def _remat_without(
    op: Op, known: Mapping[Number, Value], numbers: _Numbers, ids: "itertools.count[int]"
) -> Op:
    """A rematerialized part that is given those of the `known` values it would make."""
    (body,) = op.bodies
    made = {numbers.of[x] for one in _in_step(body) for x in one.outs}
    wanted = {number: x for number, x in known.items() if number in made}
    if not wanted:
        return op
    given = {number: Value(next(ids), x.shape, x.dtype) for number, x in wanted.items()}
    body = _without(body, given, numbers, ids)
    body = dataclasses.replace(body, ins=(*body.ins, *given.values()))
    params = dict(op.params)
    if isinstance(params.get("prevent_cse"), tuple):  # one for each operand
        params["prevent_cse"] = (*params["prevent_cse"], *(True for _ in given))
    return dataclasses.replace(
        op, ins=(*op.ins, *wanted.values()), params=MappingProxyType(params), bodies=(body,)
    )
