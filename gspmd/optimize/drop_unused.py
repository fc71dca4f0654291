"""Dead-code elimination: ops whose results nobody reads go.

%0 = tanh x
%1 = neg x            ->    %0 = tanh x
return %0                   return %0
"""

import dataclasses

from gspmd.ir import Op, Program, Value, values_of
from gspmd.sharding import Mesh


def drop_unused(program: Program, mesh: Mesh) -> Program:
    """Removes the ops that no output depends on, in bodies too, unless they have effects."""
    live: set[Value] = set(values_of(program.outs))
    kept: list[Op] = []
    for op in reversed(program.ops):
        if not op.effects and live.isdisjoint(op.outs):
            continue
        live.update(values_of(op.ins))
        if op.bodies:
            bodies = tuple(drop_unused(body, mesh) for body in op.bodies)
            op = dataclasses.replace(op, bodies=bodies)
        kept.append(op)
    return dataclasses.replace(program, ops=tuple(reversed(kept)))
