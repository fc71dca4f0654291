"""Which passes make a program send while it computes."""

import functools
import math
from collections.abc import Callable

from gspmd.ir import Program
from gspmd.optimize.matmul import loop_products
from gspmd.optimize.prefetch import prefetch
from gspmd.options import Options, Target
from gspmd.sharding import Mesh


def overlaps(options: Options, target: Target) -> tuple[Callable[[Program, Mesh], Program], ...]:
    """The passes for `options.overlap`; none for "none"."""
    if options.overlap == "none":
        return ()
    how = {"target": target, "always": options.overlap == "always"}
    room = math.inf if options.room is None else options.room
    return (
        functools.partial(prefetch, **how, room=room),
        functools.partial(loop_products, **how),
    )
