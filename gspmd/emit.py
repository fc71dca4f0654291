"""Emitting: the local values of global ones, under any sharding, and the local form of an op.

Resharding is lazy: a value keeps every version that was ever made of it, so two uses of one
sharding share one collective, and a sum is paid where it is cheapest: at a sharded use, as a
`reduce_scatter`.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from gspmd import local
from gspmd.choose import Choice, Situation, exchange, exchanges, required
from gspmd.findings import Finding, generated_whole
from gspmd.ir import (
    Cause,
    Layout,
    Literal,
    Op,
    Operand,
    Source,
    Value,
)
from gspmd.options import Target
from gspmd.reshard import reshard_steps
from gspmd.reshard.moves import lower
from gspmd.reshard.turns import Step
from gspmd.rules import factor_rule
from gspmd.rules.factor import REDUCTIONS, RULES, FactorRule, Split
from gspmd.sharding import Axes, Mesh, Sharding

Sums = dict[tuple[Value, str], Op]
"""For a value and an axis over which it owes a sum: the op in which that arises."""


@dataclasses.dataclass(frozen=True, slots=True)
class Decided:
    """How an op was split, and what it was decided on."""

    situation: Situation
    choice: Choice


@dataclasses.dataclass
class Shared:
    """What the emitters of a program and of its bodies share."""

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


class Emitter:
    """The ops of one local program or body, in the order in which they are asked for."""

    def __init__(self, state: Shared, mesh: Mesh) -> None:
        self.state = state
        self.mesh = mesh  # without the axes of manual regions around it
        self.ops: list[Op] = []
        self.versions: dict[Value, dict[Sharding, Value]] = {}
        self.recipes: dict[Value, tuple[Op, FactorRule]] = {}
        self.spread: dict[Value, tuple[Op, FactorRule, Choice]] = {}  # along dims of no operand
        self.sources: dict[Value, Source | None] = {}
        self.sums: Sums = {}
        self.masked: dict[tuple[Value, int, str], Value] = {}

    def emit(self, op: Op, rule: FactorRule, choice: Choice) -> None:
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
            if rule.spread and len(op.outs) == 1:
                self.spread[x] = (op, rule, choice)
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
            versions[needs] = self.owned(whole, needs, consumer)
            self.sums |= {(x, axis): consumer for axis in needs.partial}
            return versions[needs]
        plan = min(plans, key=lambda p: (p.wire_bytes, len(p.steps)))
        if plan.wire_bytes and x in self.spread and self._spread_anew(x, needs):
            return self.versions[x][needs]
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
        self.emit(op, rule, Choice(tuple(axes), ins, (made,), 0.0, 0.0, split))
        self.versions[x] = {**kept, **self.versions[x]}

    def _spread_anew(self, x: Value, needs: Sharding) -> bool:
        """Makes `x` again where it then is as `needs` says, along dims that no operand has."""
        op, rule, choice = self.spread[x]
        axes = list(choice.axes)
        for factors, wanted in zip(rule.outs[0], needs.dims, strict=True):
            if len(factors) == 1 and factors[0] in rule.spread:
                axes[factors[0]] = wanted
        made = dataclasses.replace(choice.outs[0], dims=required(rule.outs[0], tuple(axes)))
        if made != needs:
            return False
        kept = dict(self.versions[x])
        self.emit(op, rule, dataclasses.replace(choice, axes=tuple(axes), outs=(made,)))
        self.versions[x] = {**kept, **self.versions[x]}
        return True

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

    def owned(self, x: Operand, made: Sharding, consumer: Op) -> Value:
        """A whole `x` as a sum that is owed: one device of a group has all, the others zeros."""
        shape = x.shape if not isinstance(x, Value) or x.layout is None else x.layout.shape
        out = self.state.local_value(Value(-1, shape, x.dtype), made)
        params = {"axes": made.partial}
        self._local_op("owner", local.owner, x, out, params, consumer.source, None)
        return out
