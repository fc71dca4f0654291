"""Passes on the local program: each from a program to a program, one file each."""

import functools
from collections.abc import Callable

from gspmd.ir import Program, verify
from gspmd.optimize.combine import SMALL, combine
from gspmd.optimize.delay import delay
from gspmd.optimize.drop_unused import drop_unused
from gspmd.optimize.hoist import hoist
from gspmd.optimize.keep import keep
from gspmd.optimize.narrow import narrow
from gspmd.optimize.overlaps import overlaps
from gspmd.optimize.scatter import scatter
from gspmd.optimize.share import share
from gspmd.optimize.transposes import fewer_transposes
from gspmd.optimize.unroll import unroll
from gspmd.options import Options, Target
from gspmd.sharding import Mesh

Pass = Callable[[Program, Mesh], Program]


def passes(options: Options, target: Target) -> tuple[Pass, ...]:
    """The passes that are made for `target`, in order."""
    return (
        functools.partial(narrow, sums=options.reduction == "narrow"),
        functools.partial(hoist, room=options.room),
        share,
        delay,
        scatter,
        functools.partial(keep, room=options.keep),
        drop_unused,
        *overlaps(options, target),
        *((fewer_transposes, unroll) if target.platform == "cpu" else ()),
        functools.partial(combine, small=SMALL[target.platform]),
    )


def optimize(program: Program, mesh: Mesh, passes: tuple[Pass, ...]) -> Program:
    """The local program after `passes`, in order, verified after each."""
    for apply in passes:
        program = verify(apply(program, mesh), mesh)
    return program
