"""What the next step of a loop gathers of its weights is gathered during this step.

%1 = scan[length=8] %0, w                     #1 %1: f32[8] = all_gather[x] (step 0 of w)
  body (%2, %3: f32[8@x])              ->     %2, %3 = scan[length=7] w, %0, %1, (0 to 6)
    #1 %4: f32[8] = all_gather[x] %3            body (%4: f32[8,8@x], %5, %6: f32[8], %7: i32[])
    %5 = dot_general %2, %4                       #2 %8: f32[8] = all_gather[x] (step %7 + 1 of %4)
    return %5                                     %9 = dot_general %5, %6
                                                  return %9, %8
                                              %10 = dot_general %2, %3

The loop carries what it has gathered, and its last step stands after it, so that nothing is
gathered in vain. It finds the slices of its stacks, and puts the results of its steps into theirs,
by number: no stack is copied.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core.primitives import add_p

from gspmd import local
from gspmd.collectives import sent_by
from gspmd.ir import (
    COLLECTIVES,
    Literal,
    Op,
    Operand,
    Program,
    Value,
    bytes_of,
    leading_to,
    next_id,
    values_of,
)
from gspmd.optimize.drop_unused import drop_unused
from gspmd.optimize.ring import INDEX, Writer
from gspmd.optimize.share import is_pure
from gspmd.optimize.timing import PRODUCT, product_seconds
from gspmd.options import Target
from gspmd.sharding import Mesh


def prefetch(
    program: Program, mesh: Mesh, target: Target, *, always: bool, room: float = math.inf
) -> Program:
    """Gathers slices of a scan's stacks one step ahead.

    In each loop with `always`, else in those that compute meanwhile on a `target` that can. A loop
    then holds the gathered slices of one more step, which take at most `room` bytes.
    """

    def wanted(loop: _Loop) -> bool:
        return bytes_of(loop.gathered) <= room and (always or loop.hides(mesh, target))

    made = _ahead(program, wanted, itertools.count(next_id(program)))
    return drop_unused(made, mesh)


def _ahead(
    program: Program, wanted: "Callable[[_Loop], bool]", ids: "itertools.count[int]"
) -> Program:
    ops: list[Op] = []
    consts = list(program.consts)
    for op in program.ops:
        if op.bodies:
            bodies = tuple(_ahead(body, wanted, ids) for body in op.bodies)
            op = dataclasses.replace(op, bodies=bodies)
        loop = _Loop.of(op, ids) if op.name == "scan" and op.params["length"] > 1 else None
        if loop is not None and wanted(loop):
            ops += _Buffered(loop, ids).ops()
            consts += ((known, array) for _, known, array in loop.consts)
        else:
            ops.append(op)
    return dataclasses.replace(program, ops=tuple(ops), consts=tuple(consts))


@dataclasses.dataclass(frozen=True, slots=True)
class _Loop:
    """A scan whose steps gather something of their slices and of constants alone.

    `first` are the ops that lead to the `gathered` values, `rest` those that use them. `consts` are
    the known values of the body, with those that the steps outside of the loop use in their place.
    """

    op: Op
    body: Program
    first: tuple[Op, ...]
    rest: tuple[Op, ...]
    gathered: tuple[Value, ...]
    consts: tuple[tuple[Value, Value, Any], ...]

    @classmethod
    def of(cls, op: Op, ids: "itertools.count[int]") -> "_Loop | None":
        """The loop of a scan; None for one that has nothing to gather early."""
        (body,), (n, carried) = op.bodies, (op.params["num_consts"], op.params["num_carry"])
        if any(local.is_key(x.dtype) for x in op.outs[carried:]):
            return None  # there are no zeros to begin with
        slices = body.ins[n + carried :]
        early = _Early({*body.ins[:n], *slices, *(x for x, _ in body.consts)}, set(slices))
        ops = _lifted(body.ops, early, ids)
        found = early.gathers()
        used = {x for op in ops if op not in found for x in values_of(op.ins)}
        found = [op for op in found if op.outs[0] in used]
        if not found:
            return None
        return cls(
            op,
            body,
            tuple(leading_to(found, early.ops)),
            tuple(op for op in ops if op not in found),
            tuple(op.outs[0] for op in found),
            tuple((x, dataclasses.replace(x, id=next(ids)), array) for x, array in body.consts),
        )

    def hides(self, mesh: Mesh, target: Target) -> bool:
        """Whether more is hidden than it takes to keep for a step what was gathered."""
        if not target.directions:
            return False
        step = Program((), self.rest, ())
        work = sum(product_seconds(op, target) * n for op, n in step.walk() if op.name == PRODUCT)
        gathers = [op for op in self.first if op.name in COLLECTIVES]
        sent = sum(sent_by(op, mesh) for op in gathers)
        kept = 2 * bytes_of(self.gathered) / target.memory  # written, and read once more
        return min(work, sent / (target.link * target.directions)) > kept


class _Buffered:
    """Writes a loop that gathers one step ahead: the first gathers, the loop, its last step."""

    def __init__(self, loop: _Loop, ids: "itertools.count[int]") -> None:
        self.loop, self.ids, self.writer = loop, ids, Writer(loop.op, ids)
        op = loop.op
        n, carried, self.length = (op.params[k] for k in ("num_consts", "num_carry", "length"))
        self.carried: int = carried
        self.consts, self.carry = loop.body.ins[:n], loop.body.ins[n : n + carried]
        self.slices = loop.body.ins[n + carried :]
        self.stacks = values_of(op.ins[n + carried :])
        self.outside: dict[Value, Operand] = dict(zip(self.consts, op.ins, strict=False))
        self.outside |= {x: known for x, known, _ in loop.consts}

    def ops(self) -> list[Op]:
        w, op, length = self.writer, self.loop.op, self.length
        begin, end, by = (length - 1, 0, -1) if op.params["reverse"] else (0, length - 1, 1)
        early = self.gathers(w, self.outside, self.stacks, Literal(begin, INDEX))
        rooms = [w.room(x.shape, x.dtype, x.layout) for x in op.outs[self.carried :]]
        first = min(begin, end - by)
        numbers = w.local("steps", steps, [], (length - 1,), INDEX, first=first, length=length - 1)
        step = self.step(rooms, by)
        start = op.ins[len(self.consts) : len(self.consts) + self.carried]
        carry = (*start, *early, *rooms)
        params = {
            **op.params, "num_consts": len(self.consts) + len(self.stacks),
            "num_carry": len(carry), "length": length - 1,
        }  # fmt: skip
        outs = tuple(_anew(x, self.ids) for x in (*op.outs[: self.carried], *early, *rooms))
        ins = (*op.ins[: len(self.consts)], *self.stacks, *carry, numbers)
        frozen = MappingProxyType(params)
        w.ops.append(dataclasses.replace(op, ins=ins, outs=outs, params=frozen, bodies=(step,)))
        return self.last(outs, Literal(end, INDEX))

    def gathers(
        self, w: Writer, names: Mapping[Value, Operand], stacks: Sequence[Value], at: Operand
    ) -> list[Value]:
        """What step `at` gathers."""
        mine = dict(names)
        used = {x for op in self.loop.first for x in values_of(op.ins)}
        for stack, x in zip(stacks, self.slices, strict=True):
            if x in used:
                mine[x] = _sliced(w, stack, at, _anew(x, self.ids))
        w.ops += _copied(self.loop.first, mine, self.ids)
        return [y for x in self.loop.gathered if isinstance(y := mine[x], Value)]

    def step(self, rooms: Sequence[Value], by: int) -> Program:
        """A step of the loop, on what was gathered for it, that gathers for the next."""
        w, body = Writer(self.loop.op, self.ids), self.loop.body
        at = w.value((), INDEX)
        stacks, buffers = ([_anew(x, self.ids) for x in xs] for xs in (self.stacks, rooms))
        following = w.local("add", add_p.bind, [at, Literal(by, INDEX)], (), INDEX)
        later = self.gathers(w, {x: x for x in self.outside}, stacks, following)
        for stack, x in zip(stacks, self.slices, strict=True):
            _sliced(w, stack, at, x)
        w.ops += self.loop.rest
        rows = zip(buffers, body.outs[self.carried :], strict=True)
        kept = [_put(w, x, y, at, _anew(x, self.ids)) for x, y in rows]
        ins = (*self.consts, *stacks, *self.carry, *self.loop.gathered, *buffers, at)
        outs = (*body.outs[: self.carried], *later, *kept)
        return Program(ins, tuple(w.ops), outs, body.consts)

    def last(self, so_far: Sequence[Value], end: Operand) -> list[Op]:
        """All ops, with the last step, which gives the results of the scan."""
        w, op, body = self.writer, self.loop.op, self.loop.body
        names = dict(self.outside)
        names.update(zip((*self.carry, *self.loop.gathered), so_far, strict=False))
        for stack, x in zip(self.stacks, self.slices, strict=True):
            names[x] = _sliced(w, stack, end, _anew(x, self.ids))
        w.ops += _copied(self.loop.rest, names, self.ids)
        made = {x for done in self.loop.rest for x in done.outs}
        results: dict[Value, Value] = {}
        for x, out in zip(body.outs, op.outs[: self.carried], strict=False):
            y = names[x] if isinstance(x, Value) else x
            if x not in made or y in results or not isinstance(y, Value):
                y = w.local("relabel", local.relabel, [y], out.shape, out.dtype)
            results[y] = out
        kept = so_far[len(so_far) - len(op.outs) + self.carried :]
        rows = zip(kept, body.outs[self.carried :], op.outs[self.carried :], strict=True)
        for x, y, out in rows:
            _put(w, x, names[y] if isinstance(y, Value) else y, end, out)
        return w.finish(results)


def _sliced(w: Writer, stack: Value, at: Operand, out: Value) -> Value:
    return w.into(out, "take_step", take_step, [stack, at])


def _put(w: Writer, stack: Value, x: Operand, at: Operand, out: Value) -> Value:
    return w.into(out, "put_step", put_step, [stack, x, at])


def _anew(x: Value, ids: "itertools.count[int]") -> Value:
    return dataclasses.replace(x, id=next(ids), name="")


def _copied(
    ops: Iterable[Op], names: dict[Value, Operand], ids: "itertools.count[int]"
) -> list[Op]:
    """The same ops once more, on other values as `names` says; it learns the new ones."""
    found: list[Op] = []
    for op in ops:
        ins = tuple(names[x] if isinstance(x, Value) else x for x in op.ins)
        outs = tuple(_anew(x, ids) for x in op.outs)
        names.update(zip(op.outs, outs, strict=True))
        bodies = tuple(_copied_body(body, ids) for body in op.bodies)
        found.append(dataclasses.replace(op, ins=ins, outs=outs, bodies=bodies))
    return found


def _copied_body(body: Program, ids: "itertools.count[int]") -> Program:
    names: dict[Value, Operand] = {}
    ins = tuple(_anew(x, ids) for x in body.ins)
    names.update(zip(body.ins, ins, strict=True))
    consts = tuple((_anew(x, ids), array) for x, array in body.consts)
    names.update((x, known) for (x, _), (known, _) in zip(body.consts, consts, strict=True))
    ops = tuple(_copied(body.ops, names, ids))
    outs = tuple(names[x] if isinstance(x, Value) else x for x in body.outs)
    return Program(ins, ops, outs, consts)


class _Early:
    """The `ops` that need no more than `known` values, and which of these depend on `slices`."""

    def __init__(self, known: set[Value], slices: set[Value]) -> None:
        self.known, self.slices = known, slices
        self.ops: list[Op] = []

    def see(self, op: Op) -> None:
        ins = values_of(op.ins)
        sends = op.name in COLLECTIVES and op.name != "all_gather"
        if op.bodies or sends or not is_pure(op) or not self.known.issuperset(ins):
            return
        self.ops.append(op)
        self.known.update(op.outs)
        if not self.slices.isdisjoint(ins):
            self.slices.update(op.outs)

    def gathers(self) -> list[Op]:
        """Those that send."""
        return [op for op in self.ops if op.name == "all_gather" and op.outs[0] in self.slices]


def _lifted(ops: Iterable[Op], early: _Early, ids: "itertools.count[int]") -> list[Op]:
    """`ops`, those that are rematerialized with early gathers before them in place of inside."""
    found: list[Op] = []
    for op in ops:
        before: list[Op] = []
        if op.name == "remat":
            before, op = _without_gathers(op, early, ids)
        for now in (*before, op):
            early.see(now)
            found.append(now)
    return found


def _without_gathers(op: Op, early: _Early, ids: "itertools.count[int]") -> tuple[list[Op], Op]:
    """The early gathers of a rematerialized body, and the op with their results as operands."""
    (body,) = op.bodies
    outer = dict(zip(body.ins, op.ins, strict=True))
    inner = _Early(
        *({x for x, y in outer.items() if y in values} for values in (early.known, early.slices))
    )
    for inside in body.ops:
        inner.see(inside)
    gathers = inner.gathers()
    if not gathers:
        return [], op
    names: dict[Value, Operand] = dict(outer)
    before = _copied(leading_to(gathers, inner.ops), names, ids)
    made = tuple(x.outs[0] for x in gathers)
    rest = tuple(x for x in body.ops if x not in gathers)
    params = dict(op.params)
    if isinstance(params.get("prevent_cse"), tuple):
        params["prevent_cse"] = (*params["prevent_cse"], *(False for _ in made))
    return before, dataclasses.replace(
        op,
        ins=(*op.ins, *(names[x] for x in made)),
        params=MappingProxyType(params),
        bodies=(dataclasses.replace(body, ins=(*body.ins, *made), ops=rest),),
    )


# --- on a device


def steps(*, first: int, length: int) -> jax.Array:
    """The numbers from `first` on."""
    return jnp.arange(first, first + length, dtype=INDEX)


def take_step(stack: jax.Array, at: jax.Array) -> jax.Array:
    """Entry `at` of the leading dim."""
    words, restore = local.as_words(stack)
    return restore(lax.dynamic_index_in_dim(words, at, 0, keepdims=False))


def put_step(stack: jax.Array, x: jax.Array, at: jax.Array) -> jax.Array:
    """`stack` with `x` as entry `at` of the leading dim."""
    return lax.dynamic_update_index_in_dim(stack, x, at, 0)
