"""Passes on the local program: each from a program to a program, one file each."""

from collections.abc import Callable

from gspmd.ir import Program, verify
from gspmd.optimize.combine import combine
from gspmd.optimize.drop_unused import drop_unused
from gspmd.optimize.hoist import hoist
from gspmd.optimize.scatter import scatter
from gspmd.optimize.share import share
from gspmd.options import Options, Target
from gspmd.sharding import Mesh

Pass = Callable[[Program, Mesh], Program]


def passes(options: Options, target: Target) -> tuple[Pass, ...]:
    """The passes that are made for `target`, in order."""
    return (hoist, share, scatter, drop_unused, combine)


def optimize(program: Program, mesh: Mesh, passes: tuple[Pass, ...]) -> Program:
    """The local program after `passes`, in order, verified after each."""
    for apply in passes:
        program = verify(apply(program, mesh), mesh)
    return program
