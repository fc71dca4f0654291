"""The moves: each extends a drawn program by one step, or does nothing where no value fits."""

from collections.abc import Callable

from gspmd.testing.drawing import Drawing
from gspmd.testing.moves.flow import FLOW, NOT_SMOOTH
from gspmd.testing.moves.places import PLACES, annotation
from gspmd.testing.moves.values import OFTEN, VALUES
from gspmd.testing.moves.windows import WINDOWS

Move = Callable[[Drawing], object]


def moves(smooth: bool, annotated: bool) -> tuple[Move, ...]:
    """The moves to draw from; those that matter most stand there more than once."""
    every = (*VALUES, *PLACES, *FLOW, *WINDOWS, *OFTEN)
    often = (annotation, annotation) if annotated else ()
    return tuple(move for move in (*every, *often) if not (smooth and move in NOT_SMOOTH))
