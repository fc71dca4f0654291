"""The loss by step, drawn: in the terminal with characters, in a file by matplotlib."""

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gspmd.cli.terminal import InputError

Points = Sequence[tuple[int, float]]
"""(step, loss), in the order of the steps."""

IMAGES = (".png", ".pdf", ".svg")

# Braille cells are 2 dots wide and 4 high; the bit of each dot, by row and column.
_DOTS = ((1, 8), (2, 16), (4, 32), (64, 128))


def curve(points: Points, width: int = 64, height: int = 10, plain: bool = False) -> str:
    """A line chart in braille, in ASCII if `plain`; "" where there is no line to draw."""
    points = [(step, y) for step, y in points if math.isfinite(y)]
    if len(points) < 2:
        return ""
    steps, ys = (np.array(column) for column in zip(*points, strict=True))
    low, high = float(ys.min()), float(ys.max())
    at = np.interp(np.linspace(steps[0], steps[-1], 2 * width), steps, ys)
    rows = np.rint((high - at) / ((high - low) or 1.0) * (4 * height - 1)).astype(int)
    cells = np.zeros((height, width), int)
    for column, (row, before) in enumerate(zip(rows, [rows[0], *rows[:-1]], strict=True)):
        for dot in range(min(row, before), max(row, before) + 1):
            cells[dot // 4, column // 2] |= _DOTS[dot % 4][column % 2]
    labels = {0: f"{high:.3g}", height - 1: f"{low:.3g}"}
    edge, fill = ("|", _star) if plain else ("│", _braille)
    lines = [
        f"{labels.get(i, ''):>8} {edge}{''.join(map(fill, line))}".rstrip()
        for i, line in enumerate(cells)
    ]
    first, last = f"step {points[0][0]}", str(points[-1][0])
    return "\n".join([*lines, " " * 10 + first + last.rjust(width - len(first))])


def _braille(bits: int) -> str:
    return chr(0x2800 + int(bits)) if bits else " "


def _star(bits: int) -> str:
    return "*" if bits else " "


def save_curve(path: Path, points: Points, unit: str) -> None:
    """Draws the loss, a mean over `unit`s, by step; the format follows the name of `path`."""
    from matplotlib.figure import Figure  # the extra `plot`; pyplot would keep global state
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*points, strict=True))
    axes.set(xlabel="step", ylabel=f"loss (nats per {unit})")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def check_drawable(path: Path) -> None:
    """Raises InputError where `save_curve` could not save: better before training than after."""
    if path.suffix not in IMAGES:
        raise InputError(f"--plot {path}: the name of an image ends in {', '.join(IMAGES)}.")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--plot {path}: there is no folder {str(path.parent)!r}.")
    new = not path.exists()
    try:
        path.open("ab").close()
        if new:
            path.unlink()
    except OSError as error:
        raise InputError(f"--plot {path}: it cannot be written: {error.strerror}.") from error
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib; run: pip install 'gspmd[plot]'")
