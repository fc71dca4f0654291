"""Weight-update sharding: what an optimizer keeps of a parameter is split like the batch.

Where devices share a batch, each sums up the gradient of its part, and all then do the same update.
If the state that the update reads and writes is split over them, the sum is a reduce_scatter, each
device updates its block, and the new parameter is gathered: the bytes of an all_reduce, at a
fraction of the memory and work (arXiv 2004.13336; ZeRO, stage 1).
"""

from collections.abc import Collection, Mapping

from gspmd.ir import Op, Program, Value, values_of
from gspmd.rules import factor_rule
from gspmd.rules.control import CONTROL, ties
from gspmd.sharding import Axes, Constraint, Mesh, Sharding, root_axis

Owed = dict[Value, frozenset[str]]


def shard_update(
    model: Program,
    fixed: Mapping[Value, Constraint],
    shardings: Mapping[Value, Sharding],
    mesh: Mesh,
) -> dict[Value, Constraint]:
    """The inputs of a global program that are an optimizer's state, with a split for each.

    State is an input of which nothing is `fixed`, that elementwise ops alone read, together with a
    sum over devices (the gradient), and of which a result of its type is made that is open as well.
    It is split along those devices, beyond `shardings`, in its largest dim that falls into equal
    blocks; if there is none it stays.
    """
    readers = _readers(model)
    owed: Owed = {}
    _find_owed(model, shardings, owed)
    found: dict[Value, Constraint] = {}
    for x in model.ins:
        if any(axes is not None for axes in fixed.get(x, ())):
            continue
        made, others = _update(x, readers)
        if not any((y.shape, y.dtype) == (x.shape, x.dtype) for y in made & _open(model)):
            continue
        sums = frozenset(axis for y in others for axis in owed.get(y, ()))
        axes = _whole_axes(sums.difference(shardings[x].axes), mesh)
        constraint = _split(x, shardings[x], axes, mesh)
        if constraint is not None:
            found[x] = constraint
    return found


def _update(x: Value, readers: Mapping[Value, list[Op]]) -> tuple[set[Value], set[Value]]:
    """What elementwise ops make of `x`, and what else they read; nothing if others read it, too."""
    made, others = {x}, set[Value]()
    waiting = [x]
    while waiting:
        for op in readers.get(waiting.pop(), ()):
            if not _is_elementwise(op):
                return set(), set()
            others.update(values_of(op.ins))
            waiting += (y for y in op.outs if y not in made)
            made.update(op.outs)
    return made - {x}, others - made


def _is_elementwise(op: Op) -> bool:
    """Whether each entry of the results comes of the entries at its place in the operands."""
    return op.name not in CONTROL and factor_rule(op).elementwise


def _open(model: Program) -> set[Value]:
    """The results of which the user fixed nothing."""
    outs = set(values_of(model.outs))
    return {
        out
        for op in model.ops
        for out in op.outs
        if out in outs and op.name == "constraint" and set(op.params["dims"]) <= {None}
    }


def _readers(program: Program) -> dict[Value, list[Op]]:
    found: dict[Value, list[Op]] = {}
    for op in program.ops:
        for x in dict.fromkeys(values_of(op.ins)):
            found.setdefault(x, []).append(op)
    return found


def _find_owed(program: Program, shardings: Mapping[Value, Sharding], owed: Owed) -> None:
    """Enters for each value the axes over which it is a sum that no reduction has paid yet.

    A value owes what its operands owe, and the axes that split a factor which its op sums over.
    """
    for op in program.ops:
        if op.name in CONTROL:
            for _ in range(2):  # what a step adds to a carry, the next one reads
                for tie in ties(op):
                    _add(owed, tie.outs(op), _all(owed, tie.ins(op)))
                for body in op.bodies:
                    _find_owed(body, shardings, owed)
            for tie in ties(op):
                _add(owed, tie.outs(op), _all(owed, tie.ins(op)))
            continue
        rule = factor_rule(op)
        axes = set(_all(owed, op.ins))
        for x, dims in zip(op.ins, rule.ins, strict=True):
            if isinstance(x, Value):
                for factors, split in zip(dims, shardings[x].dims, strict=True):
                    if any(rule.kinds[f] == "sum" for f in factors):
                        axes.update(split)
        for out in op.outs:
            _add(owed, (out,), axes.difference(shardings[out].axes))


def _all(owed: Owed, values: Collection[object]) -> frozenset[str]:
    return frozenset(a for x in values if isinstance(x, Value) for a in owed.get(x, ()))


def _add(owed: Owed, values: Collection[object], axes: Collection[str]) -> None:
    for x in values:
        if isinstance(x, Value) and axes:
            owed[x] = owed.get(x, frozenset()).union(axes)


def _whole_axes(axes: Collection[str], mesh: Mesh) -> Axes:
    """The user's axes of which all parts are in `axes`, in the order of the mesh."""
    roots = dict.fromkeys(map(root_axis, mesh.names))
    return tuple(root for root in roots if set(mesh.sub_axes(root)) <= set(axes))


def _split(x: Value, sharding: Sharding, axes: Axes, mesh: Mesh) -> Constraint | None:
    """`x` split along `axes` as well, in its largest dim that falls into equal blocks."""
    parts = [part for axis in axes for part in mesh.sub_axes(axis)]
    sizes = zip(x.shape, sharding.dims, strict=True)
    even = [n % mesh.size((*held, *parts)) == 0 for n, held in sizes]
    best = max(range(len(even)), key=lambda dim: (even[dim], x.shape[dim]), default=None)
    if not axes or best is None or not even[best]:
        return None
    held = tuple(dict.fromkeys(map(root_axis, sharding.dims[best])))
    return tuple((*held, *axes) if dim == best else None for dim in range(len(even)))
