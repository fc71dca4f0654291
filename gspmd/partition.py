"""Partitioning: from a global program and its shardings to the program that every device runs.

One walk over the ops. For each, `choose` picks the split; operands are resharded to what it needs,
padding under reductions is masked, the op is emitted on local shapes, and its result stands in the
sharding that fell out, sums still owed. Resharding is lazy: a value keeps every version that was
ever made of it, so two uses of one sharding share one collective, and a sum is paid where it is
cheapest: at a sharded use, as a `reduce_scatter`.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from gspmd import local
from gspmd.choose import Choice, Situation, choose, exchange, exchanges, required
from gspmd.errors import StrictError
from gspmd.findings import Finding, gathered, generated_whole
from gspmd.ir import (
    Cause,
    Layout,
    Literal,
    Op,
    Operand,
    Program,
    Source,
    Value,
    next_id,
    values_of,
)
from gspmd.options import ROOM, Target
from gspmd.reshard import reshard_steps
from gspmd.reshard.moves import lower
from gspmd.reshard.turns import Step
from gspmd.rules import factor_rule
from gspmd.rules.control import CONTROL, Accumulator, accumulators, manual_axes, ties
from gspmd.rules.factor import REDUCTIONS, RULES, FactorRule, Split
from gspmd.rules.manual import bodies_on
from gspmd.sharding import Axes, Mesh, Sharding, itemsize


@dataclasses.dataclass(frozen=True, slots=True)
class Decided:
    """How an op was split, and what it was decided on."""

    situation: Situation
    choice: Choice


@dataclasses.dataclass(frozen=True, slots=True)
class Partitioned:
    """A local program and what was found and decided while making it.

    `decided` has the splits of all ops of the global program; an op whose operands are not there
    yet, such as zeros, has none. `work` is what a device does, in bytes it could send meanwhile.
    `visits` counts the ops that were partitioned, those of bodies that were done again again.
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
    state = _Partitioner(
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


@dataclasses.dataclass
class _Partitioner:
    """What all scopes share."""

    shardings: Mapping[Value, Sharding]
    mesh: Mesh
    target: Target
    choose: Callable[[Situation], Choice]
    rules: dict[Op, FactorRule]
    room: int
    uses: collections.Counter[Value]
    ids: "itertools.count[int]"
    findings: list[Finding] = dataclasses.field(default_factory=list[Finding])
    requests: dict[Value, Axes] = dataclasses.field(default_factory=dict[Value, Axes])
    decided: dict[Op, Decided] = dataclasses.field(default_factory=dict[Op, Decided])
    visits: int = 0

    def rule(self, op: Op) -> FactorRule:
        """The factor rule of `op`, made once."""
        known = self.rules.get(op)
        if known is None:
            known = self.rules[op] = factor_rule(op)
        return known

    def find(self, finding: Finding | None) -> None:
        if finding is not None:
            self.findings.append(finding)

    def local_value(self, value: Value, sharding: Sharding) -> Value:
        """A new local value: the shard of `value` under `sharding`."""
        return Value(
            next(self.ids),
            sharding.local_shape(value.shape, self.mesh),
            value.dtype,
            value.name,
            Layout(value.shape, sharding, value.id),
        )


class _Scope:
    """One program or body being partitioned."""

    def __init__(self, state: _Partitioner, mesh: Mesh) -> None:
        self.state = state
        self.mesh = mesh  # without the axes of manual regions around it
        self.ops: list[Op] = []
        self.work = 0.0
        self.versions: dict[Value, dict[Sharding, Value]] = {}
        self.recipes: dict[Value, tuple[Op, FactorRule]] = {}
        self.sources: dict[Value, Source | None] = {}
        self.sums: dict[tuple[Value, str], Op] = {}
        self.makers: dict[Value, Op] = {}
        self.owable: dict[Value, Mapping[str, Op]] = {}
        self.masked: dict[tuple[Value, int, str], Value] = {}

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
        self._emit(op, rule, choice)

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

    def _emit(self, op: Op, rule: FactorRule, choice: Choice) -> None:
        ins: list[Operand] = []
        for i, (x, needs) in enumerate(zip(op.ins, choice.ins, strict=True)):
            mine = self.want(x, needs, op, f"operand {i}")
            if rule.masked and isinstance(mine, Value):
                mine = self._mask(op, rule, choice, i, mine)
            ins.append(mine)
        if exchanges(rule, choice.axes):
            outs = self._exchange(op, choice, ins)
        else:
            outs = self._emit_plain(op, choice, ins)
        for x, made, mine in zip(op.outs, choice.outs, outs, strict=True):
            self.versions[x] = {made: mine}
            self.sources[x] = op.source
            for axis in made.partial:
                self.sums[x, axis] = self._summing(op, rule, choice, axis)

    def _emit_plain(self, op: Op, choice: Choice, ins: Sequence[Operand]) -> Sequence[Value]:
        """Emits `op` itself on its local operands."""
        outs = [
            self.state.local_value(x, made) for x, made in zip(op.outs, choice.outs, strict=True)
        ]
        params, call = op.params, op.call
        op_rule = RULES.get(op.name)
        if op_rule is not None and (op_rule.params or op_rule.call) and any(choice.axes):
            split = Split.of(op, self.mesh, choice.axes, choice.ins, choice.outs)
            if op_rule.params is not None:
                params = MappingProxyType({**op.params, **op_rule.params(op, split)})
            if op_rule.call is not None:
                call = op_rule.call(op, split)
        self.ops.append(
            dataclasses.replace(op, ins=tuple(ins), outs=tuple(outs), params=params, call=call)
        )
        return outs

    def _exchange(self, op: Op, choice: Choice, ins: Sequence[Operand]) -> Sequence[Value]:
        """Emits the local form of an op whose shards need each other's entries."""
        emitted = exchange(op, choice, self.mesh, self.state.ids, ins)
        assert emitted is not None, f"{op.name} was chosen in a form that it does not have"
        builder, results = emitted
        laid_out = {
            mine: dataclasses.replace(mine, layout=Layout(x.shape, made, x.id))
            for mine, x, made in zip(results, op.outs, choice.outs, strict=True)
            if mine not in ins
        }
        for made in builder.ops:
            outs = tuple(laid_out.get(x, x) for x in made.outs)
            now = [laid_out.get(x, x) if isinstance(x, Value) else x for x in made.ins]
            self.ops.append(dataclasses.replace(made, ins=tuple(now), outs=outs))
        return [
            laid_out.get(mine) or self._relabeled(mine, x, made, op.source)
            for mine, x, made in zip(results, op.outs, choice.outs, strict=True)
        ]

    def _relabeled(self, x: Value, value: Value, made: Sharding, source: Source | None) -> Value:
        """The local operand `x` as the shard of `value`, which may end earlier or later."""
        out = dataclasses.replace(self.state.local_value(value, made), name="")
        self._local_op("relabel", local.relabel, x, out, {}, source, None)
        return out

    def _summing(self, op: Op, rule: FactorRule, choice: Choice, axis: str) -> Op:
        """The op to which a result of `op` owes the sum over `axis`: itself, or one before it."""
        for f, axes in enumerate(choice.axes):
            if axis in axes and rule.kinds[f] in REDUCTIONS:
                return op
        owing = (x for x, s in zip(op.ins, choice.ins, strict=True) if axis in s.partial)
        return next(self.sums[x, axis] for x in owing if isinstance(x, Value))

    def _mask(self, op: Op, rule: FactorRule, choice: Choice, i: int, x: Value) -> Value:
        """Neutralizes the padding of `x` in the dims that `op` reduces."""
        for dim, factors in enumerate(rule.ins[i]):
            n = op.ins[i].shape[dim]
            for f in factors:
                axes, kind = choice.axes[f], rule.kinds[f]
                if not axes or kind not in REDUCTIONS or n % self.mesh.size(axes) == 0:
                    continue
                if f in rule.exchanged:  # what the op fetches of a dim holds no padding
                    continue
                if (x, dim, kind) not in self.masked:
                    out = dataclasses.replace(x, id=next(self.state.ids), name="")
                    params = {"axes": axes, "dim": dim, "size": n, "reduction": kind}
                    self._local_op("mask", local.mask, x, out, params, op.source, None)
                    self.masked[x, dim, kind] = out
                x = self.masked[x, dim, kind]
        return x

    def want(self, x: Operand, needs: Sharding, consumer: Op | None, role: str) -> Any:
        """The local value of `x` under `needs`; emits what it takes to get there."""
        if isinstance(x, Literal):
            return x
        versions = self.versions[x]
        if needs in versions:
            return versions[needs]
        if x in self.recipes:
            self._make(x, needs)
            versions = self.versions[x]
            if needs in versions:
                return versions[needs]
        plans = [
            reshard_steps(x.shape, x.dtype, self.mesh, src, needs)
            for src in versions
            if set(needs.partial) <= set(src.partial)
        ]
        if not plans:  # the sum has been paid: one device of each group keeps it
            whole = self.want(x, needs.whole, consumer, role)
            assert consumer is not None, "no sum crosses the program's boundary"
            versions[needs] = self._owned(whole, needs, consumer)
            self.sums |= {(x, axis): consumer for axis in needs.partial}
            return versions[needs]
        plan = min(plans, key=lambda p: (p.wire_bytes, len(p.steps)))
        for step in plan.steps:
            if step.dst in versions:
                continue
            sums = tuple((axis, self.sums[x, axis]) for axis in step.src.partial)
            cause = Cause(x, step.src, needs, consumer, role, sums)
            versions[step.dst] = self._step(x, versions[step.src], step, cause)
        return versions[needs]

    def _make(self, x: Value, needs: Sharding) -> None:
        """Makes a free value (zeros, iota, random bits) anew, split like `needs` if it can be."""
        op, rule = self.recipes[x]
        axes: list[Axes] = [()] * len(rule.sizes)
        for factors, wanted in zip(rule.outs[0], needs.dims, strict=True):
            if len(factors) == 1 and rule.kinds[factors[0]] != "whole":
                axes[factors[0]] = wanted
        made = Sharding(required(rule.outs[0], tuple(axes)))
        self.state.find(generated_whole(op, made, [needs], self.mesh))
        kept = dict(self.versions[x])
        if made in kept:
            return
        ins = tuple(Sharding.replicated(len(y.shape)) for y in op.ins)
        split = self.mesh.size(a for part in axes for a in part)
        self._emit(op, rule, Choice(tuple(axes), ins, (made,), 0.0, 0.0, split))
        self.versions[x] = {**kept, **self.versions[x]}

    def _step(self, value: Value, x: Value, step: Step, cause: Cause) -> Value:
        """Emits the ops of one step of a reshard."""
        source = self._source(value, step, cause)
        values = [x]
        for op in lower(step, value.shape, self.mesh):
            ins = tuple(values[i] for i in op.ins)
            out = Value(next(self.state.ids), op.shape, value.dtype)
            values.append(out)
            params = MappingProxyType(op.params)
            self.ops.append(
                Op(op.name, ins, (out,), params, source=source, call=op.call, cause=cause)
            )
        out = dataclasses.replace(values[-1], layout=Layout(value.shape, step.dst, value.id))
        self.ops[-1] = dataclasses.replace(self.ops[-1], outs=(out,))
        return out

    def _source(self, value: Value, step: Step, cause: Cause) -> Source | None:
        """The line to name: where a sum arose, for a reduction; else who needs the value."""
        made_at = self.sources.get(value)
        needed_at = cause.consumer.source if cause.consumer is not None else None
        for axis in step.src.partial:
            if axis not in step.dst.partial:
                return dict(cause.sums)[axis].source or made_at or needed_at
        return needed_at or made_at

    def _local_op(
        self,
        name: str,
        call: Any,
        x: Operand,
        out: Value,
        params: dict[str, Any],
        source: Source | None,
        cause: Cause | None,
    ) -> None:
        self.ops.append(
            Op(name, (x,), (out,), MappingProxyType(params), source=source, call=call, cause=cause)
        )

    def _control(self, op: Op) -> None:
        """Partitions an op with bodies: all values of a tie get one sharding, the rest is whole."""
        whole = Sharding.replicated
        operands = [whole(len(x.shape)) for x in op.ins]
        inputs = [[whole(len(x.shape)) for x in body.ins] for body in op.bodies]
        outputs = [[whole(len(x.shape)) for x in body.outs] for body in op.bodies]
        results = [whole(len(x.shape)) for x in op.outs]
        roles = [[f"{op.name}'s condition"] * len(body.outs) for body in op.bodies]
        for tie in ties(op):
            dims = tie.split(op, self.state.shardings, self.mesh)
            outer = tie.outside(dims, self.mesh)
            for b, i in tie.inputs:
                inputs[b][i] = Sharding(dims)
            for b, i in tie.outputs:
                outputs[b][i] = Sharding(dims)
                roles[b][i] = f"{op.name} {tie.role}"
            if tie.operand is not None:
                operands[tie.operand] = outer
            if tie.result is not None:
                results[tie.result] = outer
        ins = [
            self.want(x, goal, op, f"operand {i}")
            for i, (x, goal) in enumerate(zip(op.ins, operands, strict=True))
        ]
        arising: dict[Value, Value] = {}  # results that owe, and what owes inside
        for tie in ties(op) if len(op.bodies) == 1 else ():
            if not tie.inputs and tie.result is not None and not tie.manual:
                ((_, i),) = tie.outputs
                inner, x = op.bodies[0].outs[i], op.outs[tie.result]
                if isinstance(inner, Value):
                    arising[x] = inner
                    if axes := self.state.requests.get(x, ()):
                        self.state.requests[inner] = axes
                        outputs[0][i] = owing(outputs[0][i], axes)
                        results[tie.result] = owing(results[tie.result], axes)
        ran = self._run_bodies(op, inputs, outputs, roles)
        carried: dict[tuple[Value, str], Op] = {}
        for carry, axes in self._late(op, ran[0][0], outputs[0]):
            made = owing(outputs[0][carry.output], axes)
            inputs[0][carry.input] = outputs[0][carry.output] = results[carry.output] = made
            whole = self.want(op.ins[carry.operand], made.whole, op, f"operand {carry.operand}")
            ins[carry.operand] = self._owned(whole, made, op)
            arises = ran[0][0].arises(carry.summands[0])
            for x in (op.bodies[0].ins[carry.input], op.outs[carry.output]):
                carried |= {(x, axis): arises[axis] for axis in axes}
            for x in carry.summands:
                ran[0][0].request(x, axes)
        if carried:  # once more, with carries of which every device keeps its own summand
            ran = self._run_bodies(op, inputs, outputs, roles, carried)
            self.sums |= carried
        for x, inner in arising.items():
            self.owable[x] = ran[0][0].arises(inner)
            self.sums |= {(x, axis): made for axis, made in self.owable[x].items()}
        self.work += op.params.get("length", 1) * sum(scope.work for scope, _ in ran)
        bodies = tuple(body for _, body in ran)
        outs = tuple(self.state.local_value(v, s) for v, s in zip(op.outs, results, strict=True))
        self.ops.append(dataclasses.replace(op, ins=tuple(ins), outs=outs, bodies=bodies))
        for value, sharding, mine in zip(op.outs, results, outs, strict=True):
            self.versions[value] = {sharding: mine}

    def _run_bodies(
        self,
        op: Op,
        inputs: Sequence[Sequence[Sharding]],
        outputs: Sequence[Sequence[Sharding]],
        roles: Sequence[Sequence[str]],
        sums: Mapping[tuple[Value, str], Op] = MappingProxyType({}),
    ) -> list[tuple["_Scope", Program]]:
        """The bodies of a control-flow op, partitioned, each with the scope it was done in."""
        ran: list[tuple[_Scope, Program]] = []
        mesh = self.mesh.without(manual_axes(op, self.mesh))
        for b, body in enumerate(bodies_on(op, self.mesh)):
            scope = _Scope(self.state, mesh)
            scope.sums |= sums
            ins = [self.state.local_value(v, s) for v, s in zip(body.ins, inputs[b], strict=True)]
            ran.append((scope, scope.run(body, ins, outputs[b], roles[b], op)))
        return ran

    def _late(
        self, op: Op, scope: "_Scope", outputs: Sequence[Sharding]
    ) -> Iterator[tuple[Accumulator, Axes]]:
        """The carries of a loop whose sums can be paid after it, and over which axes.

        A carry that is split over such an axis becomes whole, as far as there is room for it.
        """
        room = float(self.state.room)
        for carry in accumulators(op):
            found = [scope.arises(x) for x in carry.summands]
            axes = tuple(a for a in self.mesh.names if all(a in arises for arises in found))
            at, shape = outputs[carry.output], op.outs[carry.output].shape
            split = tuple(a for a in axes if a in at.axes)
            if split:
                dtype, wide = (
                    op.outs[carry.output].dtype,
                    owing(at, axes).local_shape(shape, self.mesh),
                )
                growth = (math.prod(wide) - math.prod(at.local_shape(shape, self.mesh))) * itemsize(
                    dtype
                )
                if op.params["length"] > 1 and growth <= room:
                    room -= growth
                else:
                    axes = tuple(a for a in axes if a not in split)
            if axes:
                yield carry, axes

    def arises(self, x: Operand) -> Mapping[str, Op]:
        """The axes over which `x` owes a sum, or would if it were not paid before; and where to."""
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

    def request(self, x: Operand, axes: Axes) -> None:
        """Has `x`, when it is made again, owe the sums over `axes`."""
        assert isinstance(x, Value)
        self.state.requests[x] = axes
        if x not in self.owable and not any(set(axes) <= set(s.partial) for s in self.versions[x]):
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
            if len(values) == len(members):
                yield values

    def _owned(self, x: Operand, made: Sharding, consumer: Op) -> Value:
        """A whole `x` as a sum that is owed: one device of a group has all, the others zeros."""
        shape = x.shape if not isinstance(x, Value) or x.layout is None else x.layout.shape
        out = self.state.local_value(Value(-1, shape, x.dtype), made)
        params = {"axes": made.partial}
        self._local_op("owner", local.owner, x, out, params, consumer.source, None)
        return out
