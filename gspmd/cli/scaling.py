"""A sweep, drawn: the time of each mesh shape, and the best utilization over the chips."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gspmd.cli.estimate import Row, best

_COLORS = {"compute": "#4c9f70", "exposed": "#d1495b", "hidden": "#9fc5d8"}


def save(path: Path, rows: Sequence[Row], title: str) -> None:
    """Draws the rows as an image; the format follows the name of `path`.

    Left, seconds of a step for each mesh shape, stacked as computing and exposed communication,
    with what is hidden behind the computing beside it; right, MFU and HFU of the quickest mesh that
    fits on each topology, over the number of devices.
    """
    from matplotlib.figure import Figure  # the extra `plot`; pyplot would keep global state

    drawn = [row for row in rows if not row.failure]
    quickest = best(drawn)
    wide = len(quickest) > 1
    figure = Figure(figsize=(11 if wide else 7, 0.32 * len(drawn) + 2), layout="constrained")
    left = figure.add_subplot(1, 5 if wide else 1, (1, 3) if wide else 1)
    _times(left, drawn)
    if wide:
        _utilization(figure.add_subplot(1, 5, (4, 5)), quickest)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


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
    for i, row in enumerate(rows):
        if not row.fits:
            axes.text(row.step, i, " does not fit", va="center", fontsize=7, color="gray")
    axes.set_yticks(at, names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(right=1.2 * max((row.step for row in rows), default=1.0))
    axes.set_xlabel("seconds a step")
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=3)
    axes.grid(axis="x", alpha=0.3)


def _utilization(axes: Any, rows: Sequence[Row]) -> None:
    devices = [row.devices for row in rows]
    axes.plot(devices, [100 * row.mfu for row in rows], marker="o", label="MFU")
    axes.plot(devices, [100 * row.hfu for row in rows], marker="s", label="HFU")
    axes.set_xscale("log", base=2)
    axes.set_xticks(devices, [str(n) for n in devices])
    axes.set(xlabel="devices", ylabel="% of the peak, quickest mesh that fits", ylim=(0, 100))
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
