"""Choosing the split of one op: which mesh axes split which of its factors, by wire bytes.

Each operand and each result proposes a split: its own sharding, read through the factor rule.
Proposals are merged in several orders, each giving a candidate; a candidate costs the bytes that
its operands need to get there, that its results need to get where propagation wants them, and the
work that each device is left with. The cheapest wins; among equals the one that splits the work
further, then the one that pays its sums later, then the result's own proposal.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from gspmd.ir import Literal, Op, Operand, Value
from gspmd.propagate import project
from gspmd.reshard import reshard_cost
from gspmd.rules.build import Builder
from gspmd.rules.factor import REDUCTIONS, RULES, Dims, FactorRule, Split
from gspmd.sharding import Axes, Mesh, Sharding, itemsize

Type = tuple[tuple[int, ...], Any]  # shape, dtype
Task = tuple[FactorRule, tuple[Type, ...], tuple[Type, ...], tuple[Sharding, ...], Mesh]


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """How an op runs: axes per factor, what its operands must be and what its results then are.

    `wire_bytes` is what its operands, itself and its results send, `work` what each device then
    does, in bytes that it could send in the same time. `split` is the number of parts that the work
    is divided into. `optional` says that what it gathers it need not have, though at more bytes.
    """

    axes: tuple[Axes, ...]
    ins: tuple[Sharding, ...]
    outs: tuple[Sharding, ...]
    wire_bytes: float
    work: float
    split: int
    optional: bool = False

    @property
    def cost(self) -> float:
        """What the choice weighs, in bytes sent."""
        return self.wire_bytes + self.work


@dataclasses.dataclass(frozen=True)
class Situation:
    """All that the choice depends on.

    `have[i]` are the shardings in which operand i exists already; none means that it can be made
    under any sharding for free. `goals` are the shardings that propagation gave to the results.
    `lasts[i]` says that this op is the only use of operand i: only then may a sum it owes be paid
    after the op, since any other use would have to pay it as well.
    """

    rule: FactorRule
    in_types: tuple[Type, ...]
    out_types: tuple[Type, ...]
    have: tuple[tuple[Sharding, ...], ...]
    goals: tuple[Sharding, ...]
    lasts: tuple[bool, ...]
    mesh: Mesh
    flops_per_wire_byte: float  # `Target`
    op: Op | None  # where the rule has exchanged factors, whose price depends on the op

    @property
    def task(self) -> Task:
        """What the choice is about, whatever the operands look like so far."""
        return (self.rule, self.in_types, self.out_types, self.goals, self.mesh)


def choose(situation: Situation) -> Choice:
    """The cheapest split of an op."""
    return ranked(situation)[0]


def ranked(situation: Situation) -> tuple[Choice, ...]:
    """The splits that are worth a thought, the cheapest first."""
    return _ranked(situation) if situation.op is not None else _cached(situation)


def pinned(situation: Situation, axes: tuple[Axes, ...]) -> Choice | None:
    """The cheapest choice that splits the factors by `axes`; None if the op has no such form."""
    found = [_evaluate(situation, axes, flow) for flow in _flows(situation, axes)]
    return min((x for x in found if x is not None), key=_score, default=None)


def led_by_result(situation: Situation) -> Choice:
    """The split that propagation gave the result, at whatever price: what GSPMD does."""
    return pinned(situation, _candidates(situation)[0]) or choose(situation)


def _ranked(situation: Situation) -> tuple[Choice, ...]:
    found = [pinned(situation, axes) for axes in _candidates(situation)]
    choices = sorted((x for x in found if x is not None), key=_score)
    if any(exchanges(situation.rule, choice.axes) for choice in choices):
        choices = [dataclasses.replace(choice, optional=True) for choice in choices]
    return tuple(choices)


_cached = functools.lru_cache(maxsize=1 << 14)(_ranked)


def _score(choice: Choice) -> tuple[float, int, int]:
    owed = sum(len(s.partial) for s in choice.ins)
    return choice.cost, -choice.split, -owed


def _work(situation: Situation, axes: tuple[Axes, ...]) -> float:
    """The op's loop nest on one device, in bytes that could be sent in the same time."""
    rule, mesh = situation.rule, situation.mesh
    held = _operand_factors(rule)
    nest = math.prod(
        -(-size // mesh.size(part))
        for f, (size, part) in enumerate(zip(rule.sizes, axes, strict=True))
        if f in held or rule.kinds[f] != "whole"  # the dims of a result that mirror an operand's
    )
    return 2 * nest / situation.flops_per_wire_byte


@functools.lru_cache(maxsize=1 << 14)
def _operand_factors(rule: FactorRule) -> frozenset[int]:
    return frozenset(f for dims in rule.ins for factors in dims for f in factors)


def required(dims: Dims, axes: tuple[Axes, ...]) -> tuple[Axes, ...]:
    """The sharding of a tensor whose factors are split by `axes`."""
    return tuple(tuple(a for f in factors for a in axes[f]) for factors in dims)


def _candidates(situation: Situation) -> list[tuple[Axes, ...]]:
    rule, mesh = situation.rule, situation.mesh
    proposals: list[tuple[float, Dims, tuple[Axes, ...]]] = []
    for dims, goal in zip(rule.outs, situation.goals, strict=True):
        proposals.append((-math.inf, dims, goal.dims))
    offers = [
        (-math.prod(shape) * itemsize(dtype), dims, sharding)
        for dims, (shape, dtype), have in zip(
            rule.ins, situation.in_types, situation.have, strict=True
        )
        for sharding in dict.fromkeys(s.dims for s in have)
    ]
    proposals += sorted(offers, key=lambda offer: offer[0])
    split = [(dims, axes) for _, dims, axes in proposals if any(axes)]
    found: dict[tuple[Axes, ...], None] = {}
    for i, lead in enumerate(split):
        rest = split[:i] + split[i + 1 :]
        found[_merge(rule, [lead, *rest], mesh)] = None
        found[_merge(rule, [lead], mesh)] = None
    for axes in list(found):  # what a reduction costs may be more than whole operands do
        found[_unreduced(rule, axes)] = None
    if rule.exchanged or "whole" in rule.kinds:
        hard = _hard_axes(rule, split)
        for axes in list(found) if hard else ():
            for other in _moved(rule, axes, hard, mesh):
                found[other] = None
    owed = {a for have in situation.have for sharding in have for a in sharding.partial}
    if owed or not found:
        # A sum can only stay owed over axes that split nothing.
        for axes in [*found, ((),) * len(rule.sizes)]:
            found[_without(rule, axes, owed, mesh)] = None
    return list(found)


def _unreduced(rule: FactorRule, axes: tuple[Axes, ...]) -> tuple[Axes, ...]:
    """`axes` with the reduced factors whole, so that nothing is owed."""
    return tuple(
        () if kind in REDUCTIONS else part for kind, part in zip(rule.kinds, axes, strict=True)
    )


def _hard_axes(rule: FactorRule, proposals: list[tuple[Dims, tuple[Axes, ...]]]) -> Axes:
    """The axes that somebody proposes for a dim which it is hard to split, or impossible."""
    return tuple(
        dict.fromkeys(
            axis
            for dims, shards in proposals
            for factors, axes in zip(dims, shards, strict=True)
            if any(rule.kinds[f] == "whole" or f in rule.exchanged for f in factors)
            for axis in axes
        )
    )


def _moved(
    rule: FactorRule, axes: tuple[Axes, ...], hard: Axes, mesh: Mesh
) -> Iterator[tuple[Axes, ...]]:
    """`axes` with those on hard dims dropped, or moved together to a factor that can be split."""
    easy = tuple(() if f in rule.exchanged else part for f, part in enumerate(axes))
    yield easy
    used = {axis for part in easy for axis in part}
    freed = tuple(axis for axis in hard if axis not in used)
    compound = _compound(rule)
    for f, kind in enumerate(rule.kinds):
        if kind == "whole" or f in compound:
            continue
        if freed and mesh.size((*easy[f], *freed)) <= rule.sizes[f]:
            yield _one_reduction(rule, (*easy[:f], (*easy[f], *freed), *easy[f + 1 :]))


def _without(
    rule: FactorRule, axes: tuple[Axes, ...], owed: Collection[str], mesh: Mesh
) -> tuple[Axes, ...]:
    """`axes`, each factor's cut before the first that is `owed`."""
    split = [tuple(itertools.takewhile(lambda a: a not in owed, part)) for part in axes]
    _drop_straddling(rule, split, mesh)
    return tuple(split)


def _merge(
    rule: FactorRule, proposals: list[tuple[Dims, tuple[Axes, ...]]], mesh: Mesh
) -> tuple[Axes, ...]:
    """One split from several proposals: the first to name an axis, or to split a factor, wins."""
    split: list[Axes] = [()] * len(rule.sizes)
    used: set[str] = set()
    compound = _compound(rule)
    for dims, shards in proposals:
        for factors, axes in zip(dims, shards, strict=True):
            if not axes or not factors:
                continue
            for f, part in project(axes, factors, rule.sizes, mesh)[0].items():
                have = split[f]
                if rule.kinds[f] == "whole" or part[: len(have)] != have:
                    continue
                for axis in part[len(have) :]:
                    uneven = rule.sizes[f] % mesh.size((*split[f], axis))
                    if axis in used or (f in compound and uneven):
                        break
                    split[f] = (*split[f], axis)
                    used.add(axis)
    if compound:
        _drop_straddling(rule, split, mesh)
    return _one_reduction(rule, tuple(split))


@functools.lru_cache(maxsize=1 << 14)
def _compound(rule: FactorRule) -> frozenset[int]:
    return frozenset(
        f
        for dims in (*rule.ins, *rule.outs)
        for factors in dims
        if len(factors) > 1
        for f in factors
    )


def _drop_straddling(rule: FactorRule, split: list[Axes], mesh: Mesh) -> None:
    """Unsplits factors that are minor in some dim to a factor which is not split completely."""
    changed = True
    while changed:
        changed = False
        for dims in (*rule.ins, *rule.outs):
            for factors in dims:
                full = True
                for f in factors:
                    if split[f] and not full:
                        split[f], changed = (), True
                    full = full and mesh.size(split[f]) == rule.sizes[f]


def _one_reduction(rule: FactorRule, split: tuple[Axes, ...]) -> tuple[Axes, ...]:
    """Keeps one kind of reduction: a sum and a maximum owed by one result would not commute."""
    kinds = [
        kind for kind, axes in zip(rule.kinds, split, strict=True) if axes and kind in REDUCTIONS
    ]
    if len(set(kinds)) < 2:
        return split
    return tuple(
        () if kind in REDUCTIONS and kind != kinds[0] else axes
        for kind, axes in zip(rule.kinds, split, strict=True)
    )


def _flows(situation: Situation, axes: tuple[Axes, ...]) -> Iterator[dict[int, Axes]]:
    """Which operands may still owe sums after the op: none, or one linear group of them."""
    yield {}
    if exchanges(situation.rule, axes):
        return
    used = {a for part in axes for a in part}
    reduced = {
        kind
        for kind, part in zip(situation.rule.kinds, axes, strict=True)
        if part and kind in REDUCTIONS
    }
    if reduced - {"sum"}:
        return
    for group in situation.rule.linear:
        owed: Axes | None = None
        for i in group:
            if not situation.have[i] and situation.lasts[i]:
                continue  # it is made for this op: one device of a group makes it, the others zeros
            sums = [s.partial for s in situation.have[i] if s.partial and s.reduction == "sum"]
            have = sums[0] if sums and situation.lasts[i] else ()
            free = tuple(a for a in have if a not in used)
            owed = free if owed is None else tuple(a for a in owed if a in free)
        if owed:
            yield dict.fromkeys(group, owed)


def _evaluate(situation: Situation, axes: tuple[Axes, ...], flow: dict[int, Axes]) -> Choice | None:
    rule, mesh = situation.rule, situation.mesh
    cost = 0.0
    ins: list[Sharding] = []
    for i, (dims, (shape, dtype), have) in enumerate(
        zip(rule.ins, situation.in_types, situation.have, strict=True)
    ):
        needs = Sharding(required(dims, axes), _in_order(flow.get(i, ()), mesh))
        if have:
            cost += min(
                reshard_cost(shape, dtype, mesh, s, needs) for s in have if _reaches(s, needs)
            )
        ins.append(needs)
    owed = tuple(a for part in dict.fromkeys(flow.values()) for a in part)
    outs: list[Sharding] = []
    for dims, (shape, dtype), goal in zip(
        rule.outs, situation.out_types, situation.goals, strict=True
    ):
        kept = {f for factors in dims for f in factors}
        partial = owed
        kind = "sum"
        for f, part in enumerate(axes):
            if part and f not in kept and rule.kinds[f] in REDUCTIONS:
                partial, kind = partial + part, rule.kinds[f]
        made = Sharding(required(dims, axes), _in_order(partial, mesh), kind)
        # Where a sum should stay owed that is paid by now, nothing brings it back.
        owes = _reaches(made, goal)
        cost += reshard_cost(shape, dtype, mesh, made, goal) if owes else math.inf
        outs.append(made)
    split = mesh.size(a for part in axes for a in part)
    choice = Choice(axes, tuple(ins), tuple(outs), cost, _work(situation, axes), split)
    if not exchanges(rule, axes):
        return choice
    assert situation.op is not None
    sent = exchange(situation.op, choice, mesh, itertools.count())
    return sent and dataclasses.replace(choice, wire_bytes=cost + sent[0].wire_bytes)


def exchanges(rule: FactorRule, axes: tuple[Axes, ...]) -> bool:
    """Whether `axes` split a factor whose pieces need entries of each other."""
    return any(axes[f] for f in rule.exchanged)


def exchange(
    op: Op, choice: Choice, mesh: Mesh, ids: "itertools.count[int]", ins: Sequence[Operand] = ()
) -> tuple[Builder, Sequence[Value]] | None:
    """The local form of `op` where it exchanges entries, and its results; None if there is none.

    Without local operands `ins` it is made for its price alone.
    """
    partition = RULES[op.name].partition
    assert partition is not None, f"{op.name} has exchanged factors, but nothing partitions them"
    split = Split.of(op, mesh, choice.axes, choice.ins, choice.outs)
    if not ins:
        ins = [
            x if isinstance(x, Literal) else Value(next(ids), shape, x.dtype)
            for x, shape in zip(op.ins, split.in_shapes, strict=True)
        ]
    builder = Builder(mesh, op, split, ids)
    outs = partition(builder, op, split, ins)
    return None if outs is None else (builder, outs)


def _in_order(axes: Collection[str], mesh: Mesh) -> Axes:
    """Axes of which a sum is owed, as the mesh lists them: their order means nothing."""
    return tuple(axis for axis in mesh.names if axis in axes)


def _reaches(src: Sharding, dst: Sharding) -> bool:
    """A sum that is owed at `dst` must be owed at `src` already."""
    return set(dst.partial) <= set(src.partial)
