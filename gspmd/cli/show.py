"""A plan for the eye and for programs: rich renderables and JSON, from the plan alone.

Nothing here prints. Text is never read as markup, since types hold brackets: `f32[8@x,16]`.
"""

import collections
import textwrap
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gspmd.plan import Collective, Plan
from gspmd.sharding import show_axes

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
MOST_LINES = 8  # of why a collective is there: one that was combined of many has a hundred
HEAD = "bold"
FAINT = "dim"


def show_bytes(count: float) -> str:
    """`12.6 MB`: three digits, decimal units."""
    unit = 0
    while abs(count) >= 999.5 and unit < len(UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.3g} {UNITS[unit]}"


def runs(collective: Collective) -> int:
    """How often `collective` runs in a call; once where a loop without a bound hides the number."""
    return abs(collective.trips)


def executions(plan: Plan) -> int:
    """Collectives that one call of the plan executes on each device."""
    return sum(map(runs, plan.collectives))


def by_kind(plan: Plan) -> list[tuple[str, tuple[str, ...], int, float]]:
    """(kind, axes, executions, wire bytes per device), most wire bytes first."""
    count: collections.Counter[tuple[str, tuple[str, ...]]] = collections.Counter()
    wire: dict[tuple[str, tuple[str, ...]], float] = collections.defaultdict(float)
    for c in plan.collectives:
        count[c.kind, c.axes] += runs(c)
        wire[c.kind, c.axes] += c.wire_bytes * runs(c)
    rows = [(kind, axes, n, wire[kind, axes]) for (kind, axes), n in count.items()]
    return sorted(rows, key=lambda row: (-row[3], row[:2]))


def largest(plan: Plan, count: int = 3) -> list[Collective]:
    """The collectives that send the most in a call, largest first."""
    return sorted(plan.collectives, key=lambda c: -c.wire_bytes * runs(c))[:count]


def summary(plan: Plan) -> RenderableType:
    """Mesh, collectives by kind and axis, findings, and who caused the three largest."""
    parts: list[RenderableType] = [_mesh(plan), Text(), _collectives(plan)]
    if plan.collectives:
        parts += [Text(), Text("who caused the largest", HEAD)]
        parts += [_cause(c) for c in largest(plan)]
    if plan.findings:
        parts += [Text(), Text("findings", HEAD), *_findings(plan)]
    return Group(*parts)


def _mesh(plan: Plan) -> Text:
    mesh = plan.user_mesh
    return Text.assemble(("mesh ", HEAD), f"{mesh} ", (f"({mesh.devices} devices)", FAINT))


def _collectives(plan: Plan) -> RenderableType:
    if not plan.collectives:
        return Text.assemble(("collectives ", HEAD), "none: nothing is sent")
    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style=HEAD)
    table.add_column("collectives")
    table.add_column("over")
    table.add_column("times", justify="right")
    table.add_column("wire bytes", justify="right")
    for kind, axes, count, wire in by_kind(plan):
        table.add_row(Text(kind), Text(show_axes(axes)), f"{count:,}", show_bytes(wire))
    table.add_row("in all", "", f"{executions(plan):,}", show_bytes(plan.wire_bytes), style=HEAD)
    return Group(table, Text("per device and call", FAINT))


def _cause(c: Collective) -> RenderableType:
    times = f"{c.trips} × " if c.trips > 1 else ""
    loop = " in each turn of a loop without a bound" if c.trips < 0 else ""
    head = Text.assemble(
        (f"#{c.number} ", "cyan"),
        f"{c.kind} over {show_axes(c.axes)}, {times}{show_bytes(c.wire_bytes)}{loop}",
        ("  at the boundary" if c.phase == "boundary" else f"  {c.phase}, {c.source}", FAINT),
    )
    lines = textwrap.dedent(c.why).splitlines()
    if (left := len(lines) - MOST_LINES) > 0:
        lines[MOST_LINES:] = [f"... {left} more lines: plan.why({c.number})"]
    return Group(head, Padding(Text("\n".join(lines)), (0, 0, 0, 4), expand=False))


def _findings(plan: Plan) -> list[RenderableType]:
    # A loop body or a repeated layer finds the same thing many times.
    counts = collections.Counter((f.code, f.message, str(f.source or "")) for f in plan.findings)
    return [
        Text.assemble(
            (code, "yellow"),
            f": {message}",
            (f"  {source}" if source else "", FAINT),
            f" ({n} times)" if n > 1 else "",
        )
        for (code, message, source), n in counts.items()
    ]


def plan_json(plan: Plan) -> dict[str, Any]:
    """What `--json` prints: the summary with every collective, in plain types."""
    return {
        "mesh": dict(plan.user_mesh.axes),
        "devices": plan.user_mesh.devices,
        "wire_bytes": plan.wire_bytes,
        "executions": executions(plan),
        "by_kind": [
            {"kind": kind, "axes": list(axes), "executions": count, "wire_bytes": wire}
            for kind, axes, count, wire in by_kind(plan)
        ],
        "collectives": [_collective_json(c) for c in plan.collectives],
        "findings": [
            {"code": f.code, "message": f.message, "source": str(f.source or "")}
            for f in plan.findings
        ],
    }


def _collective_json(c: Collective) -> dict[str, Any]:
    return {
        "number": c.number,
        "kind": c.kind,
        "axes": list(c.axes),
        "bytes": c.bytes,
        "wire_bytes": c.wire_bytes,
        "trips": c.trips,
        "source": c.source,
        "phase": c.phase,
        "type": c.type,
        "why": c.why,
    }
