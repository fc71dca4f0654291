"""The strategies themselves, for which hypothesis must be there: see `strategies`."""

from collections.abc import Mapping
from typing import Any, TypeGuard

import hypothesis.strategies as st
from hypothesis.strategies import SearchStrategy

from gspmd.testing.drawing import LARGEST_ARGUMENT, SIZES, Drawing, draw_mesh, draw_spec
from gspmd.testing.moves import moves
from gspmd.testing.program import DrawnProgram

meshes = st.composite(draw_mesh)
specs = st.composite(draw_spec)


def is_strategy(x: Any) -> TypeGuard[SearchStrategy[Any]]:
    return isinstance(x, SearchStrategy)


@st.composite
def programs(
    draw: Any,
    steps: int,
    smooth: bool,
    annotated: bool,
    mesh: SearchStrategy[Mapping[str, int]] | Mapping[str, int],
) -> DrawnProgram:
    chosen = mesh if isinstance(mesh, Mapping) else draw(mesh)
    d = Drawing(draw, dict(chosen), smooth)
    for _ in range(d.number(1, 3)):
        d.argument(_shape(d, 1, 4), "float32", -3, 3)
    if not smooth and d.flag():
        d.argument(_shape(d, 0, 2), "int32", 0, 4)
    table = moves(smooth, annotated)
    for _ in range(d.number(1, 3 * steps)):  # not every move finds a value that fits
        if len(d.steps) < steps:
            d.pick(table)(d)
    return d.finish()


def _shape(d: Drawing, low: int, high: int) -> tuple[int, ...]:
    shape: tuple[int, ...] = ()
    room = LARGEST_ARGUMENT
    for _ in range(d.number(low, high)):
        shape = (*shape, d.pick([n for n in SIZES if n <= room]))
        room //= shape[-1]
    return shape
