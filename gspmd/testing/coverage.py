"""Coverage: which rules and collectives of one plan another plan has as well."""

import dataclasses
from collections.abc import Iterator, Mapping

from gspmd.collectives import axes_of
from gspmd.ir import COLLECTIVES, Op, Operand, Value
from gspmd.plan import Plan
from gspmd.rules import factor_rule
from gspmd.rules.control import CONTROL
from gspmd.sharding import Axes, Mesh, root_axis, show_axes


@dataclasses.dataclass(frozen=True, slots=True)
class RuleUse:
    """A primitive with its factor rule, and how operands and results are split.

    `split` reads `[*@data,*], [*,*@model] -> [*@data,*@model]`: no sizes. `uneven` says that
    axes do not divide a dim that they split.
    """

    primitive: str
    rule: str
    split: str
    uneven: bool = False

    def __str__(self) -> str:
        uneven = ", uneven" if self.uneven else ""
        return f"{self.primitive} ({self.rule}) {self.split}{uneven}"


@dataclasses.dataclass(frozen=True, slots=True)
class CollectiveUse:
    """A kind of collective over `axes`, and the primitive whose result or operand it is about."""

    kind: str
    axes: Axes
    op: str

    def __str__(self) -> str:
        return f"{self.kind}[{show_axes(self.axes)}] for {self.op}"


@dataclasses.dataclass(frozen=True)
class Coverage:
    """What a shrunken run exercised of the plan that it stands for.

    `sizes` are the sizes of dims that were shrunk, with what they became. A rule or collective of
    the full plan is `exercised` if the shrunken plan has it too, else `missed`; each is listed
    once. `str` is a report of a few lines, longer by what was missed.
    """

    name: str
    mesh: Mesh
    small_mesh: Mesh
    sizes: Mapping[int, int]
    exercised_rules: tuple[RuleUse, ...]
    missed_rules: tuple[RuleUse, ...]
    exercised_collectives: tuple[CollectiveUse, ...]
    missed_collectives: tuple[CollectiveUse, ...]

    @classmethod
    def of(cls, full: Plan, small: Plan, sizes: Mapping[int, int]) -> "Coverage":
        """The coverage of plan `full` by plan `small`."""
        rules, sent = dict.fromkeys(rule_uses(full)), dict.fromkeys(collective_uses(full))
        has_rules, has_sent = set(rule_uses(small)), set(collective_uses(small))
        return cls(
            full.name,
            full.user_mesh,
            small.user_mesh,
            dict(sizes),
            tuple(x for x in rules if x in has_rules),
            tuple(x for x in rules if x not in has_rules),
            tuple(x for x in sent if x in has_sent),
            tuple(x for x in sent if x not in has_sent),
        )

    @property
    def complete(self) -> bool:
        """Whether nothing was missed."""
        return not self.missed_rules and not self.missed_collectives

    def __str__(self) -> str:
        sizes = ", ".join(f"{n} -> {m}" for n, m in self.sizes.items() if n != m)
        dims = f"; dims {sizes}" if sizes else ""
        rows = [f"{self.name} on {self.mesh}, shrunk to {self.small_mesh}{dims}"]
        for what, done, missed in (
            ("rules", self.exercised_rules, self.missed_rules),
            ("collectives", self.exercised_collectives, self.missed_collectives),
        ):
            rows.append(f"{what}: {len(done)} of {len(done) + len(missed)} exercised")
            rows += [f"  not exercised: {x}" for x in missed]
        return "\n".join(rows)


def rule_uses(plan: Plan) -> Iterator[RuleUse]:
    """How each op of the model was split, in program order, loop bodies included."""
    makers = {out.id: op for op, _ in plan.model.walk() for out in op.outs}
    for op, _ in plan.program.walk():
        made = [_of(out) for out in op.outs]
        maker = makers.get(made[0]) if made and made[0] is not None else None
        if maker is None or maker.name in CONTROL or maker.name == "constraint":
            continue
        if op.name in COLLECTIVES or set(made) & {_of(x) for x in op.ins}:
            continue  # it moves or masks what the op has made
        ins, outs = (", ".join(map(_split, xs)) for xs in (op.ins, op.outs))
        uneven = any(_is_uneven(x, plan.mesh) for x in (*op.ins, *op.outs))
        yield RuleUse(maker.name, str(factor_rule(maker)), f"{ins} -> {outs}".strip(), uneven)


def collective_uses(plan: Plan) -> Iterator[CollectiveUse]:
    """The collectives, in program order, loop bodies included; each part of a combined one."""
    for op, _ in plan.program.walk():
        if op.name in COLLECTIVES:
            for part in op.parts or (op,):
                axes = axes_of(part)
                yield CollectiveUse(part.name, _roots(axes), _for(part))


def _for(op: Op) -> str:
    """The op that owes the sum which `op` pays; else the one that wants the value."""
    cause = op.cause
    if cause is None:
        return "an op that exchanges shards"
    if cause.src.partial != cause.dst.partial and cause.sums:
        return cause.sums[0][1].name
    if cause.consumer is None:
        return "a result"
    return "an annotation" if cause.consumer.name == "constraint" else cause.consumer.name


def _of(x: Operand) -> int | None:
    return x.layout.of if isinstance(x, Value) and x.layout is not None else None


def _split(x: Operand) -> str:
    """`[*@data,*]+model`, with axes as the user calls them."""
    if not isinstance(x, Value) or x.layout is None:
        return f"[{','.join('*' * len(x.shape))}]"
    at = x.layout.sharding
    dims = tuple(_roots(axes) for axes in at.dims)
    return str(type(at)(dims, _roots(at.partial), at.reduction))


def _roots(axes: Axes) -> Axes:
    return tuple(dict.fromkeys(root_axis(axis) for axis in axes))


def _is_uneven(x: Operand, mesh: Mesh) -> bool:
    if not isinstance(x, Value) or x.layout is None:
        return False
    dims = zip(x.layout.shape, x.layout.sharding.dims, strict=True)
    return any(n % mesh.size(axes) for n, axes in dims)
