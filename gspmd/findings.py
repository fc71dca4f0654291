"""Finding: what a user should know about a plan although nothing is wrong with its values."""

import dataclasses
from collections.abc import Collection, Sequence

from gspmd.choose import Choice
from gspmd.ir import COLLECTIVES, Op, Program, Source
from gspmd.reshard import reshard_cost
from gspmd.rules.factor import RULES, FactorRule
from gspmd.sharding import Mesh, Sharding, show_axes


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """`code` names the kind, `message` says it in a sentence, `bytes` is what each device sends."""

    code: str
    message: str
    source: Source | None = None
    bytes: float = 0.0

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


def gathered(
    op: Op, rule: FactorRule, choice: Choice, have: Sequence[Collection[Sharding]], mesh: Mesh
) -> Finding | None:
    """The finding that `op` makes operands whole for want of a better strategy, if it does.

    `have[i]` are the shardings in which operand i exists before.
    """
    moved = 0.0
    axes: dict[str, None] = {}
    for x, dims, needs, versions in zip(op.ins, rule.ins, choice.ins, have, strict=True):
        able = [s for s in versions if set(needs.partial) <= set(s.partial)]
        lost = [
            axis
            for sharding in able
            for factors, held in zip(dims, sharding.dims, strict=True)
            for axis in held
            if any(rule.kinds[f] == "whole" for f in factors)
        ]
        if lost:
            axes.update(dict.fromkeys(lost))
            moved += min(reshard_cost(x.shape, x.dtype, mesh, s, needs) for s in able)
    known = op.name in RULES
    if known and not moved:
        return None
    where = f" at {op.source}" if op.source else ""
    split = f" over {show_axes(tuple(axes))}" if axes else ""
    if known:
        code, why = "gathered", f"{op.name}{where} needs a dim whole that is split{split}"
    else:
        code, why = (
            "no-rule",
            f"{op.name}{where} has no factor rule, so it runs whole on every device",
        )
    return Finding(code, f"{why}: {moved:,.0f} bytes per device gathered", op.source, moved)


def unbounded(program: Program) -> tuple[Finding, ...]:
    """A finding for each collective of a local program in a loop whose trip count is unknown."""
    return tuple(
        Finding(
            "unbounded-loop",
            f"{op.name} at {op.source} runs in a loop without a trip count: its bytes count once",
            op.source,
        )
        for op, trips in program.walk()
        if trips < 0 and op.name in COLLECTIVES
    )
