"""What is widened before it is sent, or rounded once it has arrived, travels narrow.

%0: f32[8@x] = convert_element_type v              #1 %0: bf16[8] = all_gather[x] v
#1 %1: f32[8] = all_gather[x] %0             ->    %1: f32[8] = convert_element_type %0

#1 %0: f32[8] = all_gather[x] w                    %0: bf16[8@x] = convert_element_type w
%1: bf16[8] = convert_element_type %0        ->    #1 %1: bf16[8] = all_gather[x] %0
"""

import collections
import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from gspmd.ir import COLLECTIVES, Literal, Op, Operand, Program, Value, next_id, values_of
from gspmd.rules import op_rule
from gspmd.rules.index import sum_kind
from gspmd.sharding import Axes, Mesh, itemsize

REDUCTIONS = ("all_reduce", "reduce_scatter")
CARRIERS = (
    "all_gather", "all_to_all", "collective_permute",
    "shard", "pad_to", "relabel", "owner", "cut_block", "join_blocks", "cut_pieces", "join_pieces",
    "cut", "assemble", "thin", "slice", "reshape", "transpose", "squeeze",
)  # fmt: skip
"""Ops that take entries from one place to another, and may leave zeros elsewhere: a conversion
changes places with them, since it gives zero for zero."""

MOVERS = (*CARRIERS, *REDUCTIONS)


def narrow(program: Program, mesh: Mesh, sums: bool = False) -> Program:
    """Moves conversions across collectives to the side on which there are more bytes.

    Values stay the same to the bit: a conversion moves across a reduction where one device at most
    has something else than zeros, as in a look-up in a split table. With `sums` it moves across
    every reduction of floats, which is then rounded in the narrow type.
    """
    return _narrowed(program, itertools.count(next_id(program)), sums)


def _narrowed(program: Program, ids: "itertools.count[int]", sums: bool) -> Program:
    ops: list[Op] = []
    for op in program.ops:
        if op.bodies:
            bodies = tuple(_narrowed(body, ids, sums) for body in op.bodies)
            op = dataclasses.replace(op, bodies=bodies)
        ops.append(op)
    program = dataclasses.replace(program, ops=tuple(ops))
    if not any(op.name == "convert_element_type" for op in ops):
        return program
    return _round_earlier(_widen_later(program, ids, sums), ids, sums)


def _widen_later(program: Program, ids: "itertools.count[int]", sums: bool) -> Program:
    """Carries what was widened as it was before, and widens it where that is asked for."""
    readers, lone = _readers(program), _lone(program)
    widened: dict[Value, Op] = {}  # by which conversion
    for op in program.ops:
        if _scale(op) > 1:
            widened[op.outs[0]] = op
        elif op.name in MOVERS:
            ways = [widened.get(x) if isinstance(x, Value) else None for x in op.ins]
            way = _agreed([way and way.ins[0] for way in ways], ways)
            if way is not None and _crosses(op, way, lone, sums):
                widened[op.outs[0]] = way
    sent: set[Op] = set()  # collectives, and what leads to them
    for op in reversed(program.ops):
        if op.name not in MOVERS or op.outs[0] not in widened:
            continue
        if op.name in COLLECTIVES or not sent.isdisjoint(readers[op.outs[0]]):
            sent.add(op)
    slim: dict[Value, Value] = {}
    ops: list[Op] = []
    for op in program.ops:
        if op not in sent:
            ops.append(op)
            if _scale(op) > 1:
                slim.update(zip(op.outs, values_of(op.ins), strict=True))
            continue
        (out,) = op.outs
        ins = tuple(slim[x] for x in values_of(op.ins))
        slim[out] = dataclasses.replace(out, id=next(ids), dtype=ins[0].dtype)
        ops.append(dataclasses.replace(op, ins=ins, outs=(slim[out],)))
        if not sent.issuperset(readers[out]):
            ops.append(dataclasses.replace(widened[out], ins=(slim[out],), outs=(out,)))
    return dataclasses.replace(program, ops=tuple(ops))


def _round_earlier(program: Program, ids: "itertools.count[int]", sums: bool) -> Program:
    """Rounds before it is sent what all readers round."""
    rounded = _rounded(program, sums)
    slim: dict[Value, Value] = {}  # of what collectives give, and what is made of that
    early: dict[tuple[Value, str], Value] = {}
    renamed: dict[Value, Value] = {}
    ops: list[Op] = []

    def now(x: Operand) -> Operand:
        return renamed.get(x, x) if isinstance(x, Value) else x

    def round_(x: Value, convert: Op) -> Value:
        dtype = convert.outs[0].dtype
        key = (x, str(dtype))
        if key not in early:
            early[key] = dataclasses.replace(x, id=next(ids), dtype=dtype, name="")
            ops.append(dataclasses.replace(convert, ins=(x,), outs=(early[key],)))
        return early[key]

    for op in program.ops:
        op = dataclasses.replace(op, ins=tuple(map(now, op.ins)))
        xs = values_of(op.ins)
        way = rounded.get(op.outs[0]) if op.outs else None
        if way is not None and (op.name in COLLECTIVES or not slim.keys().isdisjoint(xs)):
            (out,) = op.outs
            ins = tuple(slim.get(x) or round_(x, way) for x in xs)
            slim[out] = dataclasses.replace(out, id=next(ids), dtype=ins[0].dtype)
            ops.append(dataclasses.replace(op, ins=ins, outs=(slim[out],)))
        elif xs and xs[0] in slim:  # a conversion, like all that reads it
            renamed[op.outs[0]] = slim[xs[0]]
        else:
            ops.append(op)
    outs = tuple(map(now, program.outs))
    return dataclasses.replace(program, ops=tuple(ops), outs=outs)


def _rounded(program: Program, sums: bool) -> dict[Value, Op]:
    """The results of movers that all readers round to one type, and by which conversion."""
    readers, lone = _readers(program), _lone(program)
    found: dict[Value, Op] = {}
    for op in reversed(program.ops):
        if op.name not in MOVERS or any(isinstance(x, Literal) for x in op.ins):
            continue
        ways = [
            reader if reader and _scale(reader) < 1 else found.get(reader.outs[0])
            if reader and reader.outs else None
            for reader in readers[op.outs[0]]
        ]  # fmt: skip
        way = _agreed([way and way.outs[0] for way in ways], ways)
        if way is not None and _crosses(op, way, lone, sums):
            found[op.outs[0]] = way
    return found


def _agreed(types: Sequence[Operand | None], ways: Sequence[Op | None]) -> Op | None:
    """The first of the conversions `ways`, if there is one for each and all are of one type."""
    agree = len({x and str(x.dtype) for x in types}) == 1
    return ways[0] if agree else None


def _crosses(op: Op, convert: Op, lone: Mapping[Value, frozenset[str]], sums: bool) -> bool:
    """Whether the mover `op` gives the same before and after a conversion."""
    if op.name in CARRIERS:
        return True
    (x,) = values_of(op.ins)
    if x in lone and lone[x].issuperset(op.params["axes"]):
        return True
    return sums and all(
        jnp.issubdtype(x.dtype, jnp.floating) for x in (*convert.ins, *convert.outs)
    )


def _scale(op: Op) -> float:
    """How many times as many bytes a conversion gives as it takes; 1 for other ops."""
    if op.name != "convert_element_type" or isinstance(op.ins[0], Literal):
        return 1.0
    narrow, wide = sorted((op.ins[0].dtype, op.outs[0].dtype), key=itemsize)
    if "whole" in (sum_kind(narrow), sum_kind(wide)):  # a type without a zero
        return 1.0
    return itemsize(op.outs[0].dtype) / itemsize(op.ins[0].dtype)


def _readers(program: Program) -> Mapping[Value, list[Op | None]]:
    """The ops that read each value; None where the program returns it."""
    found: dict[Value, list[Op | None]] = collections.defaultdict(list)
    for op in program.ops:
        for x in dict.fromkeys(values_of(op.ins)):
            found[x].append(op)
    for x in values_of(program.outs):
        found[x].append(None)
    return found


def _lone(program: Program) -> Mapping[Value, frozenset[str]]:
    """The axes along which each entry of a value is zero on all devices but one."""
    found: dict[Value, frozenset[str]] = {}
    for op in program.ops:
        if len(op.outs) != 1:
            continue
        (out,), known = op.outs, op_rule(op)
        held: set[str] = set()
        if known is not None and known.picks:
            held.update(set(_owed(out)).difference(*map(_owed, values_of(op.ins))))
        if op.name in MOVERS or op.name == "convert_element_type":
            alone = [found.get(x) if isinstance(x, Value) else None for x in op.ins]
            held.update(frozenset.intersection(*(axes or frozenset() for axes in alone)))
        if op.name == "owner":
            held.update(op.params["axes"])
        if op.name in REDUCTIONS:
            held.difference_update(op.params["axes"])
        if held:
            found[out] = frozenset(held)
    return found


def _owed(x: Value) -> Axes:
    return x.layout.sharding.partial if x.layout is not None else ()
