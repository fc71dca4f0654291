"""Small collectives of a kind over the same axes travel together: one message instead of several.

#1 %1 = all_reduce[x] %0
#2 %3 = all_reduce[x] %2    ->    #1 %1, %3 = all_reduce[x] %0, %2
%4 = add %1, %3                   %4 = add %1, %3
"""

import dataclasses
from collections.abc import Hashable, Mapping

from gspmd.ir import Op, Program, Value, bytes_of, values_of
from gspmd.options import Platform
from gspmd.sharding import Mesh

Small = Mapping[str, int]
"""By kind of collective: bytes per device, of the operand or the result, up to which its latency
counts for more than they do. A kind that is not there always travels alone."""

SMALL: Mapping[Platform, Small] = {
    # The compilers make one of several all-reduces; of several gathers or scatters, TPU's does not.
    "tpu": {"all_reduce": 1 << 20},
    "gpu": {"all_reduce": 1 << 20},
    # As one array, after a copy (`collectives.FORMS`). Four that are alone or together: of 16 KB
    # 0.9 ms or 0.5 ms, of 64 KB 1.5 ms or 1.3 ms, of 256 KB the same.
    "cpu": dict.fromkeys(("all_reduce", "all_gather", "reduce_scatter"), 1 << 16),
}


@dataclasses.dataclass
class _Group:
    """Collectives that go out together, at position `at` of the program; -1 until one is used."""

    ops: list[Op]
    at: int = -1


def combine(program: Program, mesh: Mesh, small: Small = SMALL["tpu"]) -> Program:
    """Merges independent small collectives of equal kind, axes, reduction and dtype.

    Each waits until a result of its group is first used; then the group goes out as one. One that
    comes later still joins if its operand was there by then.
    """
    groups: dict[Hashable, _Group] = {}
    waiting: dict[Value, _Group] = {}
    born: dict[Value, int] = {}
    ops: list[Op | _Group] = []

    def send(group: _Group) -> None:
        group.at = len(ops)
        ops.append(group)
        for out in (out for op in group.ops for out in op.outs):
            born[out] = group.at
            del waiting[out]

    for op in program.ops:
        for x in values_of(op.ins):
            if x in waiting:
                send(waiting[x])
        if op.bodies:
            bodies = tuple(combine(body, mesh, small) for body in op.bodies)
            op = dataclasses.replace(op, bodies=bodies)
        if max(bytes_of(op.ins), bytes_of(op.outs)) > small.get(op.name, -1):
            born.update(dict.fromkeys(op.outs, len(ops)))
            ops.append(op)
            continue
        key = (op.name, op.params["axes"], op.params.get("reduction"), str(op.outs[0].dtype))
        group = groups.get(key)
        ready = max((born.get(x, -1) for x in values_of(op.ins)), default=-1)
        if group is None or 0 <= group.at <= ready:
            group = groups[key] = _Group([])
        group.ops.append(op)
        if group.at < 0:
            waiting.update(dict.fromkeys(op.outs, group))
        else:
            born.update(dict.fromkeys(op.outs, group.at))
    for group in groups.values():
        if group.at < 0:
            send(group)
    merged = (_merged(op.ops) if isinstance(op, _Group) else op for op in ops)
    return dataclasses.replace(program, ops=tuple(merged))


def _merged(group: list[Op]) -> Op:
    if len(group) == 1:
        return group[0]
    largest = max(group, key=lambda op: bytes_of(op.ins))
    params = largest.params
    if "dim" in params:
        params = {**params, "dim": tuple(dim for op in group for dim in _dims(op))}
    return dataclasses.replace(
        largest,
        params=params,
        ins=tuple(x for op in group for x in op.ins),
        outs=tuple(x for op in group for x in op.outs),
        parts=tuple(part for op in group for part in op.parts or (op,)),
    )


def _dims(op: Op) -> tuple[int, ...]:
    """The dim of each operand."""
    dim = op.params["dim"]
    return (dim,) * len(op.ins) if isinstance(dim, int) else dim
