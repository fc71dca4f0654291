"""A report for the eye and for programs, and the table of a sweep. Nothing here prints."""

import collections
import dataclasses
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from gspmd.cli.estimate import Row, best
from gspmd.cli.show import FAINT, HEAD, show_bytes
from gspmd.cli.terminal import console
from gspmd.compiled import Comparison
from gspmd.report import PARTS, Report, show_energy, show_pipeline
from gspmd.sharding import show_axes

_BAR = 40  # characters


def show_seconds(seconds: float) -> str:
    """`6.31 s`, `12.5 ms`, `3.2 us`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us" if seconds else "0 s"


def summary(made: Report) -> RenderableType:
    """Time, utilization and memory, then what takes the most of each."""
    parts: list[RenderableType] = [_head(made), Text(), _numbers(made), Text(), _time(made)]
    if made.collectives:
        parts += [Text(), _collectives(made)]
    parts += [Text(), _ops(made)]
    if made.memory.buffers:
        parts += [Text(), _buffers(made)]
    if made.findings:
        parts += [Text(), Text("findings", HEAD)]
        parts += [Text.assemble((f.code, "yellow"), f": {f.message}") for f in made.findings]
    return Group(*parts)


def _head(made: Report) -> Text:
    mesh = made.placement.mesh
    lines = str(made.placement).splitlines()[1:]
    return Text.assemble(
        (f"{made.topology.name} ", HEAD),
        (f"{made.topology.chips} chips, {made.devices} devices", FAINT),
        "\n",
        ("mesh ", HEAD),
        f"{mesh}",
        *(("\n" + line, FAINT) for line in lines),
    )


def _numbers(made: Report) -> RenderableType:
    flops = made.flops
    table = _table("", "")
    rows = [
        ("step", show_seconds(made.seconds.step)),
        ("MFU", f"{100 * made.mfu:.1f} %  {flops.model:.4g} model FLOPs"),
        ("HFU", f"{100 * made.hfu:.1f} %  {flops.hardware:.4g} FLOPs on each device"),
        ("as GSPMD counts", f"{100 * made.utilization:.1f} %  without rematerialization"),
        (
            "memory",
            f"{show_bytes(made.peak_bytes)} of {show_bytes(made.chip.device_memory)} a device",
        ),
    ]
    rows += [("pipeline", show_pipeline(row, made.seconds.step)) for row in made.pipelines]
    rows.append(("energy", show_energy(made)))
    for name, text in rows:
        table.add_row(Text(name, HEAD), text)
    table.show_header = False
    return table


def _time(made: Report) -> RenderableType:
    """One bar: computing, then what communication adds; below, what it hides."""
    s = made.seconds
    parts = (("compute", s.compute, "green"), ("exposed", s.exposed, "red"))
    table = _table("seconds", "", "share")
    for name, value, color in (*parts, ("hidden", s.hidden, "cyan")):
        share = value / s.step if s.step else 0.0
        cells = round(_BAR * share)
        table.add_row(name, Text("█" * cells, color), f"{show_seconds(value)}  {100 * share:.1f} %")
    return table


def _collectives(made: Report) -> RenderableType:
    total: dict[tuple[str, str], list[float]] = collections.defaultdict(lambda: [0.0, 0.0, 0.0])
    for row in made.collectives:
        entry = total[row.kind, show_axes(row.axes)]
        for i, value in enumerate((1.0, row.seconds, row.exposed)):
            entry[i] += value * row.trips
    table = _table("collectives", "over", "times", "takes", "exposed")
    for (kind, axes), (times, takes, exposed) in sorted(
        total.items(), key=lambda item: -item[1][1]
    ):
        table.add_row(kind, axes, f"{times:,.0f}", show_seconds(takes), show_seconds(exposed))
    return table


def _ops(made: Report, most: int = 6) -> RenderableType:
    rows = sorted(made.ops, key=lambda row: -row.seconds * row.trips)[:most]
    table = _table("slowest ops", "result", "waits for", "takes", "line")
    for row in rows:
        where = f"{row.phase}, {row.source}"
        takes = show_seconds(row.seconds * row.trips)
        table.add_row(Text(row.name), Text(row.type), row.bound, takes, Text(where, FAINT))
    return table


def _buffers(made: Report, most: int = 6) -> RenderableType:
    table = _table("largest buffers", "kind", "type", "bytes", "line")
    for buffer in made.memory.buffers[:most]:
        table.add_row(
            Text(buffer.name),
            buffer.kind,
            Text(buffer.type),
            show_bytes(buffer.bytes),
            Text(buffer.source, FAINT),
        )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style=HEAD)
    for column in columns:
        right = column in ("times", "takes", "exposed", "bytes")
        table.add_column(column, justify="right" if right else "left")
    return table


def table(rows: Sequence[Row]) -> RenderableType:
    """A line for each mesh shape; the quickest that fits stands out."""
    chosen = {(row.topology, row.mesh) for row in best(rows)}
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style=HEAD)
    several = len({row.topology for row in rows}) > 1
    piped = any(row.bubble for row in rows)
    names = ["mesh", "memory", "fits", "wire bytes", "compute", "hidden", "exposed"]
    names += ["bubble"] * piped + ["step", "MFU"]
    for name in (["topology"] if several else []) + names:
        made.add_column(name, justify="left" if name in ("topology", "mesh", "fits") else "right")
    for row in rows:
        lead = [row.topology] if several else []
        if row.failure:
            made.add_row(*lead, row.mesh, *[""] * (len(names) - 1), style=FAINT)
            continue
        style = "bold green" if (row.topology, row.mesh) in chosen else FAINT * (not row.fits)
        made.add_row(
            *lead,
            row.mesh,
            show_bytes(row.peak_bytes),
            "yes" if row.fits else "no",
            show_bytes(row.wire_bytes),
            *(show_seconds(x) for x in (row.compute, row.hidden, row.exposed)),
            *[show_seconds(row.bubble)] * piped,
            show_seconds(row.step),
            f"{100 * row.mfu:.1f} %",
            style=style,
        )
    return Group(made, *_failures(rows))


def _failures(rows: Iterable[Row]) -> Iterator[Text]:
    """A line for each reason why there is no report, with the meshes that it is true of."""
    meshes: dict[str, list[str]] = {}
    for row in rows:
        if row.failure:
            meshes.setdefault(row.failure, []).append(row.mesh)
    for failure, found in meshes.items():
        others = f" and {len(found) - 1} more" if len(found) > 1 else ""
        yield Text(f"{found[0]}{others}: {failure}", FAINT)


def progress(rows: Iterable[Row], count: int, quiet: bool) -> Iterator[Row]:
    """`rows`, with a bar on stderr while they are found."""
    columns = (
        TextColumn("planning"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    out = console(sys.stderr)
    with Progress(*columns, console=out, disable=quiet or not out.is_terminal) as bar:
        task = bar.add_task("", total=count)
        for row in rows:
            bar.advance(task)
            yield row


def report_json(made: Report, compiled: Comparison | None = None) -> dict[str, Any]:
    """What `--json` prints: all numbers in plain types, and the rows of ops and collectives."""
    judged = {} if compiled is None else {"compiled": dataclasses.asdict(compiled)}
    numbers = {name: _number(made, name) for name in PARTS}
    return {
        "topology": made.topology.name,
        "chip": made.chip.name,
        "devices": made.devices,
        "mesh": dict(made.placement.mesh.axes),
        **numbers,
        "seconds.hidden": made.seconds.hidden,
        "memory_bytes": made.chip.device_memory,
        "fits": made.fits,
        "joules": made.joules,
        "collectives": [dataclasses.asdict(row) for row in made.collectives],
        "ops": [dataclasses.asdict(row) for row in made.ops],
        "pipelines": [dataclasses.asdict(row) for row in made.pipelines],
        "buffers": [dataclasses.asdict(row) for row in made.memory.buffers],
        "findings": [{"code": f.code, "message": f.message} for f in made.findings],
        **judged,
    }


def _number(made: Report, name: str) -> float:
    value: Any = made
    for part in name.split("."):
        value = getattr(value, part)
    return value


def row_json(row: Row) -> dict[str, Any]:
    """A row of a sweep in plain types; what is unknown is null."""
    values = dataclasses.asdict(row) | {"fits": row.fits}
    return {key: None if isinstance(x, float) and math.isnan(x) else x for key, x in values.items()}
