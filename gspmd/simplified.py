"""simplified: a local program as XLA has it when it gives out memory."""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

from gspmd.ir import Layout, Op, Operand, Program, Value, next_id, values_of
from gspmd.sharding import itemsize

_ONCE = ("remat", "shard_map")  # their bodies run once, where they stand


def simplified(program: Program) -> Program:
    """`program` with the bodies that run once in place of their ops, and with its loops' inputs in
    the type that the loops convert them to.

    An input that a scan only converts to a narrower type is converted before it, for all steps at
    once and for all scans that do so: XLA moves what does not change out of loops.
    """
    return _Simplifier(next_id(program)).program(program)


class _Simplifier:
    def __init__(self, first: int) -> None:
        self.next = first

    def program(self, program: Program) -> Program:
        known: dict[Value, Operand] = {}
        consts = list(program.consts)
        narrow: dict[tuple[Value, Any], Value] = {}
        ops: list[Op] = []

        def read(x: Operand) -> Operand:
            return known.get(x, x) if isinstance(x, Value) else x

        def add(op: Op) -> None:
            ins = tuple(map(read, op.ins))
            if op.name in _ONCE:
                (body,) = op.bodies
                consts.extend(body.consts)
                known.update(zip(body.ins, ins, strict=True))
                for inner in body.ops:
                    add(inner)
                known.update(zip(op.outs, map(read, body.outs), strict=True))
                return
            if op.bodies or ins != op.ins:
                bodies = tuple(map(self.program, op.bodies))
                op = dataclasses.replace(op, ins=ins, bodies=bodies)
            if op.name == "scan":
                op = self.convert(op, narrow, ops)
            ops.append(op)

        for op in program.ops:
            add(op)
        return Program(program.ins, tuple(ops), tuple(map(read, program.outs)), tuple(consts))

    def convert(self, scan: Op, narrow: dict[tuple[Value, Any], Value], ops: list[Op]) -> Op:
        """`scan` on converted inputs; adds to `ops` the conversions that are not in `narrow`."""
        (body,) = scan.bodies
        inside = _conversions(body)
        if not inside:
            return scan
        first = scan.params["num_consts"]
        then = first + scan.params["num_carry"]
        ins, given = list(scan.ins), list(body.ins)
        gone: set[Op] = set()
        for i, (x, value) in enumerate(zip(scan.ins, body.ins, strict=True)):
            op = inside.get(value)
            if op is None or first <= i < then or not isinstance(x, Value):
                continue
            (out,) = op.outs
            key = (x, out.dtype)
            if key not in narrow:
                name = f"{x} in {out.dtype}"
                layout = x.layout and Layout(x.layout.shape, x.layout.sharding)
                narrow[key] = Value(self.next, x.shape, out.dtype, name, layout)
                self.next += 1
                ops.append(dataclasses.replace(op, ins=(x,), outs=(narrow[key],)))
            ins[i], given[i] = narrow[key], out
            gone.add(op)
        kept = tuple(op for op in body.ops if op not in gone)
        inner = Program(tuple(given), kept, body.outs, body.consts)
        return dataclasses.replace(scan, ins=tuple(ins), bodies=(inner,))


def _conversions(body: Program) -> Mapping[Value, Op]:
    """The ops that convert inputs of a loop's body to a narrower type, where nobody else reads."""
    readers: dict[Value, list[Op]] = collections.defaultdict(list)
    for op in body.ops:
        for x in dict.fromkeys(values_of(op.ins)):
            readers[x].append(op)
    outs = set(values_of(body.outs))
    found: dict[Value, Op] = {}
    for value in body.ins:
        if value in outs or len(readers[value]) != 1:
            continue
        (op,) = readers[value]
        if op.name != "convert_element_type" or op.outs[0] in outs:
            continue
        if itemsize(op.outs[0].dtype) < itemsize(value.dtype):
            found[value] = op
    return found
