"""Why: the chain of origins behind a collective or a sharding, down to the user's lines."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import networkx as nx

from gspmd.ir import Cause, Op, Program, Value, values_of
from gspmd.propagate import Origin, Place, Propagated
from gspmd.rules import factor_rule
from gspmd.rules.control import CONTROL
from gspmd.sharding import Sharding, show_type

LONGEST_CHAIN = 6  # steps shown of one chain; the middle of a longer one is counted, not shown


@dataclasses.dataclass(frozen=True)
class Context:
    """What explanations are read from: the model, its shardings, and who made each value."""

    model: Program
    shardings: Mapping[Value, Sharding]
    origins: Mapping[Place, Origin]
    producers: Mapping[Value, Op]
    named: Mapping[str, Value]

    @classmethod
    def of(cls, model: Program, propagated: Propagated) -> "Context":
        producers = {out: op for op, _ in model.walk() for out in op.outs}
        named = {v.name: v for v in (*values_of(model.outs), *model.ins) if v.name}
        for op, _ in model.walk():
            if op.name == "name":
                named.setdefault(op.params["name"], op.outs[0])
        return cls(model, propagated.shardings, propagated.origins, producers, named)

    def type(self, value: Value) -> str:
        return show_type(value.shape, value.dtype, self.shardings[value])


def why_value(value: Value, context: Context) -> str:
    """Who put each axis on each dim of `value`."""
    lines = [f"{_called(value, context)} is {context.type(value)}"]
    for dim, axes in enumerate(context.shardings[value].dims):
        lines += [f"  dim {dim} over {axis}: {chain((value, dim, axis), context)}" for axis in axes]
    if not context.shardings[value].axes:
        lines.append("  no axis splits it: no annotation reaches it, or one says so")
    return "\n".join(lines)


def why_collective(op: Op, context: Context) -> str:
    """Which shardings met at a collective, and who set each; for each part of a combined one."""
    texts = [_why(part, context) for part in op.parts or (op,)]
    return "\n".join(dict.fromkeys(texts))


def _why(op: Op, context: Context) -> str:
    if op.cause is None:
        return f"  the program asks for it (manual region at {op.source})"
    cause, axes = op.cause, op.params.get("axes") or op.params["src"]
    value = cause.value
    have = show_type(value.shape, value.dtype, cause.src)
    if cause.src == cause.dst and cause.consumer is not None:
        return "\n".join(_exchanged(cause, cause.consumer, axes, context))
    needs = show_type(value.shape, value.dtype, cause.dst)
    lines = [f"  {_called(value, context)} is {have}; {_needed_by(cause)} needs {needs}"]
    for axis in axes:
        if axis in cause.src.partial:
            lines += _owed(cause, axis, context)
        else:
            lines += _held(value, cause.src, axis, context)
        lines += _wanted(cause, axis, context)
    return "\n".join(dict.fromkeys(lines))


def _exchanged(cause: Cause, op: Op, axes: Sequence[str], context: Context) -> list[str]:
    """Why the shards of an op's operand need each other's entries."""
    value = cause.value
    have = show_type(value.shape, value.dtype, cause.src)
    lines = [
        f"  {_called(value, context)} is {have}; {_needed_by(cause)} keeps it so, and its shards "
        "need entries of each other"
    ]
    for axis in axes:
        lines += _held(value, cause.src, axis, context)
    return [*lines, f"  its rule is {factor_rule(op)}"]


def chain(place: Place, context: Context) -> str:
    """How an axis came to a dim: `dot_general (mlp.py:9) <- annotation P('x') (mlp.py:8)`."""
    steps: list[str] = []
    seen: set[Place] = set()
    at: Place | None = place
    while at is not None and at not in seen:
        seen.add(at)
        origin = context.origins.get(at)
        if origin is None:
            break
        where = f" ({origin.source})" if origin.source else ""
        step = f"{origin.label}{where}"
        if not steps or steps[-1] != step:
            steps.append(step)
        at = origin.parent
    if not steps:
        return "chosen at this op"
    if len(steps) > LONGEST_CHAIN:
        hidden = len(steps) - LONGEST_CHAIN + 1
        steps = [*steps[: LONGEST_CHAIN - 2], f"... {hidden} more steps ...", *steps[-1:]]
    return " <- ".join(steps)


def _called(value: Value, context: Context) -> str:
    if value.name:
        return value.name
    op = context.producers.get(value)
    if op is None:
        return "a value that the function or a body starts with"
    where = f" at {op.source}" if op.source else ""
    return f"the result of {op.name}{where}"


def _needed_by(cause: Cause) -> str:
    op = cause.consumer
    if op is None:
        return cause.role or "the program's boundary"
    where = f" at {op.source} ({op.source.phase})" if op.source else ""
    if op.name == "constraint":
        return f"{op.params['label']} {op.params['spec']}".strip() + where
    return f"{cause.role} of {op.name}{where}"


def _held(value: Value, src: Sharding, axis: str, context: Context) -> list[str]:
    for dim, axes in enumerate(src.dims):
        if axis in axes:
            place = (value, dim, axis)
            return [f"  its dim {dim} is split over {axis}: {chain(place, context)}"]
    return []


NOUNS = {"sum": "a sum", "max": "a maximum", "min": "a minimum", "prod": "a product"}


def _owed(cause: Cause, axis: str, context: Context) -> list[str]:
    """What is owed over `axis`, and the op that reduces over dims split by it."""
    op = dict(cause.sums)[axis]
    what = NOUNS.get(cause.src.reduction, f"an {cause.src.reduction}")
    where = f" ({op.source})" if op.source else ""
    lines = [f"  {what} over {axis} is owed: {op.name}{where} reduces over dims split by it"]
    operands = [(f"operand {i}", x) for i, x in enumerate(op.ins) if isinstance(x, Value)]
    return lines + [
        f"    {label} {context.type(x)}, dim {dim}: {chain((x, dim, axis), context)}"
        for label, x, dim in _splits(operands, axis, context)
    ]


def _splits(
    tensors: Sequence[tuple[str, Value]], axis: str, context: Context
) -> Iterator[tuple[str, Value, int]]:
    """Those of the labelled values that `axis` splits, and in which dim."""
    for label, x in tensors:
        for dim, axes in enumerate(context.shardings[x].dims):
            if axis in axes:
                yield label, x, dim


def _wanted(cause: Cause, axis: str, context: Context) -> list[str]:
    """Where else the consumer uses the axis: the sharding that this one met."""
    op = cause.consumer
    if op is None or op.name in CONTROL:  # the values of a loop have nothing to do with each other
        return []
    result = "result" if len(op.outs) == 1 else "result {}"
    tensors = [(f"operand {i}", x) for i, x in enumerate(op.ins) if isinstance(x, Value)]
    tensors += [(result.format(i), x) for i, x in enumerate(op.outs)]
    others = [(label, x) for label, x in tensors if x != cause.value]
    lines = [
        f"  it meets {label} {context.type(x)}, dim {dim} over {axis}: "
        f"{chain((x, dim, axis), context)}"
        for label, x, dim in _splits(others, axis, context)
    ]
    if not lines and op.name != "constraint":
        whole = [k for k in factor_rule(op).kinds if k == "whole"]
        if whole:
            lines.append(f"  {op.name} needs a whole dim: its rule is {factor_rule(op)}")
    return lines


def graph(context: Context, collectives: Sequence[Op]) -> "nx.DiGraph[str]":
    """Ops and values of the model as nodes, data flow as edges.

    Op nodes carry `kind="op"`, `op`, `source`, `phase`, `collectives` (numbers of those that the op
    caused); value nodes `kind="value"`, `type`, `sharding` and `name`.
    """
    caused: dict[int, list[int]] = {}
    for number, op in enumerate(collectives, start=1):
        for part in op.parts or (op,):
            if part.cause is not None and part.cause.consumer is not None:
                caused.setdefault(id(part.cause.consumer), []).append(number)
    g: nx.DiGraph[str] = nx.DiGraph()

    def value_node(value: Value) -> str:
        key = f"v{value.id}"
        if key not in g:
            g.add_node(
                key,
                kind="value",
                name=str(value),
                type=context.type(value),
                sharding=context.shardings[value],
            )
        return key

    for i, (op, trips) in enumerate(context.model.walk()):
        key = f"op{i}"
        g.add_node(
            key,
            kind="op",
            op=op.name,
            source=str(op.source) if op.source else "",
            phase="" if op.source is None else op.source.phase,
            trips=trips,
            collectives=tuple(caused.get(id(op), ())),
        )
        g.add_edges_from((value_node(x), key) for x in values_of(op.ins))
        g.add_edges_from((key, value_node(x)) for x in op.outs)
        for body in op.bodies:
            g.add_edges_from((key, value_node(x)) for x in body.ins)
            g.add_edges_from((value_node(x), key) for x in values_of(body.outs))
    return g
