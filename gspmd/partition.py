"""Partitioning: from a global program and its shardings to the program that every device runs.

One walk over the ops. For each, `choose` picks the split; operands are resharded to what it needs,
padding under reductions is masked, the op is emitted on local shapes, and its result stands in the
sharding that fell out, sums still owed (`emit`). What a loop only adds up is paid after it.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from gspmd.choose import Choice, Situation, choose
from gspmd.emit import Decided, Emitter, Shared, Sums
from gspmd.errors import StrictError
from gspmd.findings import Finding, gathered, generated_whole
from gspmd.ir import (
    Literal,
    Op,
    Operand,
    Program,
    Value,
    next_id,
    values_of,
)
from gspmd.options import ROOM, Target
from gspmd.rules.control import (
    CONTROL,
    Accumulator,
    Boundary,
    accumulators,
    handed_out,
    manual_axes,
)
from gspmd.rules.factor import RULES, FactorRule
from gspmd.rules.manual import bodies_on
from gspmd.sharding import Axes, Mesh, Sharding, itemsize


@dataclasses.dataclass(frozen=True, slots=True)
class Partitioned:
    """A local program and what was found and decided while making it.

    `decided` has the splits of all ops of the global program; an op whose operands are not there
    yet, such as zeros, has none. `work` is what a device does, in bytes it could send meanwhile.
    `visits` counts the ops that were partitioned, those of bodies that were done again.
    """

    program: Program
    findings: tuple[Finding, ...]
    decided: Mapping[Op, Decided]
    work: float
    visits: int


def partition(
    program: Program,
    shardings: Mapping[Value, Sharding],
    mesh: Mesh,
    target: Target,
    choose: Callable[[Situation], Choice] = choose,
    rules: dict[Op, FactorRule] | None = None,
    room: int = ROOM,
) -> Partitioned:
    """The local program of `program`, whose inputs and outputs are split as `shardings` say.

    `choose` decides how each op is split. `rules` remembers the factor rules of ops, from one call
    to the next. `room` are the bytes by which the carries of a loop may grow on each device.
    """
    ids = itertools.count(next_id(program))
    state = Shared(
        shardings,
        mesh,
        target,
        choose,
        {} if rules is None else rules,
        room,
        _count_uses(program),
        ids,
    )
    ins = tuple(state.local_value(v, shardings[v]) for v in program.ins)
    outs = tuple(shardings[x] if isinstance(x, Value) else None for x in program.outs)
    scope = _Scope(state, mesh)
    made = scope.run(program, ins, outs, [f"output {i}" for i in range(len(outs))])
    findings = tuple(dict.fromkeys(state.findings))
    return Partitioned(made, findings, state.decided, scope.work, state.visits)


def owing(at: Sharding, axes: Axes) -> Sharding:
    """`at` with the sums over `axes` owed, which then split nothing."""
    dims = tuple(tuple(axis for axis in part if axis not in axes) for part in at.dims)
    return Sharding(dims, axes)


def refuse_gathers(findings: Sequence[Finding]) -> None:
    """Raises if any of `findings` is about an op that can only run gathered.

    Raises:
      StrictError: it names each, with its line and bytes.
    """
    costly = [finding for finding in findings if finding.bytes]
    if costly:
        count = "one op" if len(costly) == 1 else f"{len(costly)} ops"
        lines = "".join(f"\n  {finding.message}" for finding in costly)
        raise StrictError(
            f"strict=True, but {count} can only run on gathered operands:{lines}\n"
            "Leave these dims unsplit, register a rule (gspmd.register_rule), or drop strict."
        )


def _count_uses(program: Program) -> collections.Counter[Value]:
    uses: collections.Counter[Value] = collections.Counter()
    stack = [program]
    while stack:
        p = stack.pop()
        uses.update(values_of(p.outs))
        for op in p.ops:
            uses.update(values_of(op.ins))
            stack += op.bodies
    return uses


class _Scope(Emitter):
    """One program or body being partitioned."""

    def __init__(self, state: Shared, mesh: Mesh) -> None:
        super().__init__(state, mesh)
        self.work = 0.0
        self.makers: dict[Value, Op] = {}
        self.owable: dict[Value, Mapping[str, Op]] = {}
        self.handed: dict[Value, tuple[_Scope, Value]] = {}  # out of bodies, where each comes of

    def run(
        self,
        program: Program,
        ins: Sequence[Value],
        outs: Sequence[Sharding | None],
        roles: Sequence[str],
        consumer: Op | None = None,
    ) -> Program:
        """Partitions `program`, given its local inputs and the shardings its outputs must have."""
        for value, mine in zip(program.ins, ins, strict=True):
            assert mine.layout is not None
            self.versions[value] = {mine.layout.sharding: mine}
        consts: list[tuple[Value, Any]] = []
        for value, array in program.consts:
            whole = Sharding.replicated(len(value.shape))
            mine = self.state.local_value(value, whole)
            self.versions[value] = {whole: mine}
            consts.append((mine, array))
        for op in program.ops:
            self.makers.update(dict.fromkeys(op.outs, op))
            self.visit(op)
        results = tuple(
            x
            if isinstance(x, Literal)
            else self.want(x, sharding or Sharding.replicated(0), consumer, role)
            for x, sharding, role in zip(program.outs, outs, roles, strict=True)
        )
        return Program(tuple(ins), tuple(self.ops), results, tuple(consts))

    def visit(self, op: Op) -> None:
        """Emits the local form of one op."""
        self.state.visits += 1
        if op.name in CONTROL:
            self._control(op)
            return
        if op.name == "constraint":
            (x,), (out,) = op.ins, op.outs
            if isinstance(x, Value):
                goal = self._goal(out)
                self.versions[out] = {goal: self.want(x, goal, op, "the annotation")}
                self.sums |= {(out, axis): self.sums[x, axis] for axis in goal.partial}
                return
        rule = self.state.rule(op)
        owes = any(s.partial for x in values_of(op.ins) for s in self.versions[x])
        if rule.free and len(op.outs) == 1 and op.name in RULES and not owes:
            self.versions[op.outs[0]] = {}
            self.recipes[op.outs[0]] = (op, rule)
            return
        situation = self._situation(op, rule)
        choice = self.state.choose(situation)
        self.state.decided[op] = Decided(situation, choice)
        self.work += choice.work
        self.state.find(gathered(op, rule, choice, situation.have, self.mesh))
        if op.outs:
            wanted = [situation.goals[-1], *(s for have in situation.have for s in have)]
            self.state.find(generated_whole(op, choice.outs[-1], wanted, self.mesh))
        self.emit(op, rule, choice)

    def _situation(self, op: Op, rule: FactorRule) -> Situation:
        state = self.state
        return Situation(
            rule,
            tuple((x.shape, x.dtype) for x in op.ins),
            tuple((x.shape, x.dtype) for x in op.outs),
            tuple(tuple(self.versions[x]) if isinstance(x, Value) else () for x in op.ins),
            tuple(self._goal(x) for x in op.outs),
            tuple(isinstance(x, Value) and state.uses[x] == 1 for x in op.ins),
            self.mesh,
            state.target.flops_per_wire_byte,
            op if rule.exchanged else None,
        )

    def _goal(self, x: Value) -> Sharding:
        """The sharding that `x` should have; requested sums stay owed in it."""
        goal, axes = self.state.shardings[x], self.state.requests.get(x, ())
        return owing(goal, axes) if axes else goal

    def _control(self, op: Op) -> None:
        """Partitions an op with bodies; sums that a loop only adds up are left for after it."""
        at = Boundary.of(op, self.state.shardings, self.mesh)
        ins = [
            self.want(x, goal, op, f"operand {i}")
            for i, (x, goal) in enumerate(zip(op.ins, at.operands, strict=True))
        ]
        handed: dict[Value, Value] = {}
        for k, i in handed_out(op):
            x, inner = op.outs[k], op.bodies[0].outs[i]
            if isinstance(inner, Value):
                handed[x] = inner
                if axes := self.state.requests.get(x, ()):
                    at.outputs[0][i], at.results[k] = (
                        owing(s, axes) for s in (at.outputs[0][i], at.results[k])
                    )
        ran = self._run_bodies(op, at, {})
        carried: Sums = {}
        for carry, axes in self._late(op, ran[0][0], at):
            made = owing(at.outputs[0][carry.output], axes)
            at.inputs[0][carry.input] = at.outputs[0][carry.output] = made
            at.results[carry.output] = made
            start = self.want(op.ins[carry.operand], made.whole, op, f"operand {carry.operand}")
            ins[carry.operand] = self.owned(start, made, op)
            arises = ran[0][0].arises(carry.summands[0])
            for x in (op.bodies[0].ins[carry.input], op.outs[carry.output]):
                carried |= {(x, axis): arises[axis] for axis in axes}
            for x in carry.summands:
                ran[0][0].request(x, axes)
        if carried:  # once more, with carries of which every device keeps its own summand
            ran = self._run_bodies(op, at, carried)
        self.sums |= carried
        for x, inner in handed.items():
            self.owable[x] = ran[0][0].arises(inner)
            self.handed[x] = (ran[0][0], inner)
            self.sums |= {(x, axis): made for axis, made in self.owable[x].items()}
        self.work += op.params.get("length", 1) * sum(scope.work for scope, _ in ran)
        bodies = tuple(body for _, body in ran)
        outs = tuple(self.state.local_value(v, s) for v, s in zip(op.outs, at.results, strict=True))
        self.ops.append(dataclasses.replace(op, ins=tuple(ins), outs=outs, bodies=bodies))
        for value, sharding, mine in zip(op.outs, at.results, outs, strict=True):
            self.versions[value] = {sharding: mine}

    def _run_bodies(self, op: Op, at: Boundary, sums: Sums) -> list[tuple["_Scope", Program]]:
        """The bodies of a control-flow op, partitioned, each with the scope it was done in."""
        ran: list[tuple[_Scope, Program]] = []
        mesh = self.mesh.without(manual_axes(op, self.mesh))
        for b, body in enumerate(bodies_on(op, self.mesh)):
            scope = _Scope(self.state, mesh)
            scope.sums |= sums
            ins = [
                self.state.local_value(v, s) for v, s in zip(body.ins, at.inputs[b], strict=True)
            ]
            ran.append((scope, scope.run(body, ins, at.outputs[b], at.roles[b], op)))
        return ran

    def _late(self, op: Op, scope: "_Scope", at: Boundary) -> Iterator[tuple[Accumulator, Axes]]:
        """The carries of a loop whose sums can be paid after it, and over which axes.

        A carry that is split over such an axis becomes whole, as far as there is room for it.
        """
        room = float(self.state.room)
        for carry in accumulators(op):
            found = [scope.arises(x) for x in carry.summands]
            axes = tuple(a for a in self.mesh.names if all(a in arises for arises in found))
            now, x = at.results[carry.output], op.outs[carry.output]
            split = tuple(a for a in axes if a in now.axes)
            if split:
                held, wide = (
                    math.prod(s.local_shape(x.shape, self.mesh)) * itemsize(x.dtype)
                    for s in (now, owing(now, axes))
                )
                if op.params["length"] > 1 and wide - held <= room:
                    room -= wide - held
                else:
                    axes = tuple(a for a in axes if a not in split)
            if axes:
                yield carry, axes

    def arises(self, x: Operand) -> Mapping[str, Op]:
        """The axes over which `x` owes a sum, or would if nobody paid; and where each arises."""
        if not isinstance(x, Value):
            return {}
        sums = {a for s in self.versions[x] if s.reduction == "sum" for a in s.partial}
        found = {axis: self.sums[x, axis] for axis in self.mesh.names if axis in sums}
        if x in self.owable:
            return {**self.owable[x], **found}
        for group in self._linear(x):
            each = [self.arises(y) for y in group]
            found |= {a: op for a, op in each[0].items() if all(a in one for one in each)}
        return found

    def request(self, x: Value, axes: Axes) -> None:
        """Has `x`, when it is made again, owe the sums over `axes`, and what it is made of."""
        self.state.requests[x] = axes
        if x in self.handed:
            scope, inner = self.handed[x]
            scope.request(inner, axes)
        elif not any(set(axes) <= set(s.partial) for s in self.versions[x]):
            for group in self._linear(x):
                for y in group:
                    self.request(y, axes)

    def _linear(self, x: Value) -> Iterator[list[Value]]:
        """The operands in which the op that makes `x` is linear, where this is their only use."""
        op = self.makers.get(x)
        if op is None or op.bodies:
            return
        for group in ((0,),) if op.name == "constraint" else self.state.rule(op).linear:
            members = [op.ins[i] for i in group]
            values = [y for y in members if isinstance(y, Value) and self.state.uses[y] == 1]
            # What is made for this op alone, such as zeros, owes whatever is asked of it.
            made = [y for y in values if y not in self.recipes]
            if made and len(values) == len(members):
                yield made
