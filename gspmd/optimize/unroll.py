"""A short loop in a loop runs without one, on CPU.

XLA on CPU copies what each step of a loop takes of its inputs, such as a layer's weights, and what
it gives back, such as their gradients. A short loop in another one, as over the layers that a stage
of a pipeline has, pays for that in each step of the outer one:

scan[length=9] ...:                            scan[length=9] ...:
  scan[length=4] ...               ->            scan[length=4 unroll=4] ...
"""

import dataclasses
from types import MappingProxyType

from gspmd.ir import Op, Program, trip_count
from gspmd.sharding import Mesh

SHORT = 4  # steps: with more of them, what is compiled grows faster than what is saved


def unroll(program: Program, mesh: Mesh) -> Program:
    """Marks the short scans in the loops of a program as unrolled: they are compiled so."""
    return _marked(program, False)


def _marked(program: Program, repeated: bool) -> Program:
    def mark(op: Op) -> Op:
        if not op.bodies:
            return op
        within = repeated or trip_count(op) != 1
        op = dataclasses.replace(op, bodies=tuple(_marked(body, within) for body in op.bodies))
        if repeated and op.name == "scan" and 1 < op.params["length"] <= SHORT:
            params = MappingProxyType({**op.params, "unroll": op.params["length"]})
            op = dataclasses.replace(op, params=params)
        return op

    return dataclasses.replace(program, ops=tuple(map(mark, program.ops)))
