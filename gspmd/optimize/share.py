"""Common-subexpression elimination: what is computed twice is computed once.

#1 %0 = all_gather[x] w
#2 %1 = all_gather[x] w    ->    #1 %0 = all_gather[x] w
%2 = add %0, %1                  %1 = add %0, %0
"""

import dataclasses
from collections.abc import Hashable
from typing import Any

from gspmd.ir import Op, Operand, Program, Value
from gspmd.sharding import Mesh

STATEFUL = ("rng_uniform",)
"""Primitives that give something else each time, though JAX records no effect of theirs."""


def share(program: Program, mesh: Mesh) -> Program:
    """Merges ops of equal name, operands, params and result types; looks inside each body alone."""
    seen: dict[Hashable, Op] = {}
    renamed: dict[Value, Value] = {}
    ops: list[Op] = []

    def new(x: Operand) -> Operand:
        return renamed.get(x, x) if isinstance(x, Value) else x

    for op in program.ops:
        op = dataclasses.replace(
            op, ins=tuple(map(new, op.ins)), bodies=tuple(share(body, mesh) for body in op.bodies)
        )
        key = _key(op)
        if key is not None and key in seen:
            renamed.update(zip(op.outs, seen[key].outs, strict=True))
            continue
        if key is not None:
            seen[key] = op
        ops.append(op)
    return dataclasses.replace(program, ops=tuple(ops), outs=tuple(map(new, program.outs)))


def is_pure(op: Op) -> bool:
    """Whether `op` gives the same whenever it runs, and does nothing else."""
    return not op.effects and op.name not in STATEFUL


def _key(op: Op) -> Hashable | None:
    """What makes two ops equal; None for an op that must not be merged."""
    if op.bodies or not is_pure(op):
        return None
    operands = tuple(x if isinstance(x, Value) else _literal(x.value, x.dtype) for x in op.ins)
    types = tuple((x.shape, x.dtype, x.layout) for x in op.outs)
    key = (op.name, operands, types, tuple(sorted(op.params.items(), key=lambda item: item[0])))
    try:
        hash(key)
    except TypeError:  # params that hold arrays or functions by value
        return None
    return key


def _literal(value: Any, dtype: Any) -> Hashable:
    return (repr(value), str(dtype))
