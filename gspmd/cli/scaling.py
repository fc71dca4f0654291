"""A sweep, drawn: the time of each mesh shape, and the best utilization over the chips."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gspmd import meshes
from gspmd.cli.estimate import Row, best
from gspmd.cli.show_report import show_seconds

_COLORS = {"compute": "#4c9f70", "exposed": "#d1495b", "hidden": "#9fc5d8"}


def save(path: Path, rows: Sequence[Row], title: str) -> None:
    """Draws the rows as an image; the format follows the name of `path`.

    Left, seconds of a step for each mesh shape, stacked as computing and exposed communication,
    with what is hidden behind the computing beside it, as far as those that fit take; right, MFU
    and HFU of the quickest mesh that fits, over the chips of a topology, a line for each kind.
    """
    from matplotlib.figure import Figure  # the extra `plot`; pyplot would keep global state

    drawn = [row for row in rows if not row.failure]
    quickest = curves(drawn)
    wide = sum(map(len, quickest.values())) > 1
    figure = Figure(figsize=(11 if wide else 7, 0.32 * len(drawn) + 2), layout="constrained")
    left = figure.add_subplot(1, 5 if wide else 1, (1, 3) if wide else 1)
    _times(left, drawn)
    if wide:
        _utilization(figure.add_subplot(1, 5, (4, 5)), quickest)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def curves(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """For each kind of chip, by the number of chips, the quickest row that fits."""
    found: dict[str, dict[int, Row]] = {}
    for row in best(rows):
        place = meshes.topology(row.topology)
        curve = found.setdefault(place.chip.name, {})
        curve[place.chips] = min(curve.get(place.chips, row), row, key=lambda r: r.step)
    return found


def longest(rows: Sequence[Row]) -> float:
    """The most seconds of a step that fits, or of any if none does: as far as the axis goes."""
    return max((row.step for row in rows if row.fits), default=0.0) or max(r.step for r in rows)


def _times(axes: Any, rows: Sequence[Row]) -> None:
    several = len({row.topology for row in rows}) > 1
    names = [f"{row.topology}  {row.mesh}" if several else row.mesh for row in rows]
    at = range(len(rows))
    compute = [row.compute for row in rows]
    axes.barh(at, compute, color=_COLORS["compute"], label="compute")
    axes.barh(
        at, [r.exposed for r in rows], left=compute, color=_COLORS["exposed"],
        label="exposed communication",
    )  # fmt: skip
    axes.barh(
        at, [r.hidden for r in rows], height=0.25, color=_COLORS["hidden"],
        label="hidden communication",
    )  # fmt: skip
    right = 1.05 * longest(rows)
    for i, row in enumerate(rows):
        if not row.fits:  # beyond the end of the axis, if that is where the bar ends
            axes.text(
                min(row.step, right), i, f" {show_seconds(row.step)}, does not fit", va="center",
                fontsize=7, color="gray",
            )  # fmt: skip
    axes.set_yticks(at, names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, right)
    axes.set_xlabel("seconds a step")
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=3)
    axes.grid(axis="x", alpha=0.3)


def _utilization(axes: Any, quickest: Mapping[str, Mapping[int, Row]]) -> None:
    for k, (chip, curve) in enumerate(quickest.items()):
        chips = sorted(curve)
        for name, values, style in (
            ("MFU", [curve[n].mfu for n in chips], "o-"),
            ("HFU", [curve[n].hfu for n in chips], "s--"),
        ):
            shares = [100 * x for x in values]
            axes.plot(chips, shares, style, color=f"C{k}", label=f"{name}, {chip}")
    ticks = sorted({n for curve in quickest.values() for n in curve})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.set(xlabel="chips", ylabel="% of the peak, quickest mesh that fits", ylim=(0, 100))
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
