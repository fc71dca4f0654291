"""Control flow: which values of an op and of its bodies are one and the same, dim by dim.

A `Tie` says that an operand, inputs and outputs of the bodies, and a result must be sharded alike:
a scan's carry is one tie of all four. Propagation treats a tie like a pointwise op; the partitioner
gives all its values one sharding. What is in no tie (a predicate, a branch index) is replicated.

A manual region (`shard_map`) is control flow as well: its body runs once on every shard along the
manual axes, so that outside of it a dim is split over those first, then over what splits it inside.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

from gspmd.ir import Literal, Op, Operand, Value
from gspmd.rules.factor import Dims, FactorRule, Factors
from gspmd.sharding import Axes, Mesh, Sharding


@dataclasses.dataclass(frozen=True, slots=True)
class Tie:
    """One value on its way through an op with bodies; `role` is what a reader calls it.

    `inputs` and `outputs` are (body, position) pairs. The first `lead` dims of the operand and of
    the result (a scan's length) exist outside the bodies only. `manual` are the user's mesh axes
    that split the operand's or the result's dims outside of a manual region, and are unknown in it.
    """

    role: str
    operand: int | None = None
    inputs: tuple[tuple[int, int], ...] = ()
    outputs: tuple[tuple[int, int], ...] = ()
    result: int | None = None
    lead: int = 0
    manual: tuple[Axes, ...] = ()

    def ins(self, op: Op) -> tuple[Operand, ...]:
        """What feeds the tie: the operand and the bodies' outputs."""
        operand = () if self.operand is None else (op.ins[self.operand],)
        return (*operand, *(op.bodies[b].outs[i] for b, i in self.outputs))

    def outs(self, op: Op) -> tuple[Operand, ...]:
        """What the tie feeds: the bodies' inputs and the result."""
        result = () if self.result is None else (op.outs[self.result],)
        return (*(op.bodies[b].ins[i] for b, i in self.inputs), *result)

    def outer(self, op: Op) -> Operand:
        """The operand, or the result where there is none."""
        if self.operand is not None:
            return op.ins[self.operand]
        assert self.result is not None
        return op.outs[self.result]

    def rule(self, op: Op) -> FactorRule:
        """The pointwise factor rule of the tie; leading dims outside the bodies are whole.

        The manual axes split a factor of their own, which is major and exists outside only.
        """
        f = Factors()
        inner = self.inputs or self.outputs
        body, i = inner[0]
        side = op.bodies[body].ins if self.inputs else op.bodies[body].outs
        shared = f.dims(side[i].shape)

        def outer(x: Operand) -> Dims:
            if self.manual:
                return tuple(
                    (f.new(n // (f.sizes[own[0]] or 1)), *own) if axes else own
                    for n, own, axes in zip(x.shape, shared, self.manual, strict=True)
                )
            return f.dims(x.shape[: self.lead], "whole") + shared

        ins = [shared] * len(self.outputs)
        outs = [shared] * len(self.inputs)
        if self.operand is not None:
            ins.insert(0, outer(op.ins[self.operand]))
        if self.result is not None:
            outs.append(outer(op.outs[self.result]))
        return f.rule(ins, outs)

    def split(self, op: Op, shardings: Mapping[Value, Sharding], mesh: Mesh) -> tuple[Axes, ...]:
        """The split that all values of the tie have inside the bodies."""
        if not self.inputs or self.manual:
            # What is split evenly outside of a region is so inside; not the other way about.
            outer = self.outer(op)
            if isinstance(outer, Literal):
                return ()
            dims = shardings[outer].dims[self.lead :]
            if not self.manual:
                return dims
            prefix = self.prefix(mesh)
            return tuple(axes[len(own) :] for axes, own in zip(dims, prefix, strict=True))
        body, i = self.inputs[0]
        return shardings[op.bodies[body].ins[i]].dims

    def outside(self, dims: tuple[Axes, ...], mesh: Mesh) -> Sharding:
        """The sharding of the operand and the result, where `dims` is the split in the bodies."""
        if self.manual:
            dims = tuple((*own, *axes) for own, axes in zip(self.prefix(mesh), dims, strict=True))
        return Sharding(((),) * self.lead + dims)

    def prefix(self, mesh: Mesh) -> tuple[Axes, ...]:
        """The manual axes that split each dim outside, as they are cut on `mesh`."""
        return tuple(_parts(axes, mesh) for axes in self.manual)


def _parts(axes: Axes, mesh: Mesh) -> Axes:
    """What the user's `axes` are cut into on `mesh`, axes of size 1 left out."""
    parts = (part for axis in axes for part in mesh.sub_axes(axis))
    return tuple(part for part in parts if mesh.size((part,)) > 1)


def manual_axes(op: Op, mesh: Mesh) -> Axes:
    """The axes that nothing in the bodies of `op` may be split over: it runs on shards of them."""
    return _parts(op.params["manual"], mesh) if op.name == "shard_map" else ()


def manual_places(op: Op, mesh: Mesh) -> Iterator[tuple[Value, tuple[Axes, ...]]]:
    """The operands and results of a manual region, with the manual axes that split their dims."""
    if op.name != "shard_map":
        return
    for tie in ties(op):
        outer = tie.outer(op)
        if isinstance(outer, Value):
            yield outer, tie.prefix(mesh)


def _scan(op: Op) -> list[Tie]:
    (body,) = op.bodies
    consts, carry = op.params["num_consts"], op.params["num_carry"]
    ties: list[Tie] = []
    for i in range(len(body.ins)):
        k = i - consts
        if k < 0:
            ties.append(Tie(f"const {i}", i, ((0, i),)))
        elif k < carry:
            ties.append(Tie(f"carry {k}", i, ((0, i),), ((0, k),), k))
        else:
            ties.append(Tie(f"xs {k - carry}", i, ((0, i),), lead=1))
    ys = range(carry, len(op.outs))
    return ties + [Tie(f"ys {k - carry}", outputs=((0, k),), result=k, lead=1) for k in ys]


def _while(op: Op) -> list[Tie]:
    test, body = op.params["cond_nconsts"], op.params["body_nconsts"]
    ties = [Tie(f"condition's const {i}", i, ((0, i),)) for i in range(test)]
    ties += [Tie(f"const {i}", test + i, ((1, i),)) for i in range(body)]
    for k in range(len(op.outs)):
        ties.append(
            Tie(f"carry {k}", test + body + k, ((1, body + k), (0, test + k)), ((1, k),), k)
        )
    return ties


def _cond(op: Op) -> list[Tie]:
    branches = range(len(op.bodies))
    ties = [
        Tie(f"operand {i}", i + 1, tuple((b, i) for b in branches)) for i in range(len(op.ins) - 1)
    ]
    return ties + [
        Tie(f"result {k}", outputs=tuple((b, k) for b in branches), result=k)
        for k in range(len(op.outs))
    ]


def _remat(op: Op) -> list[Tie]:
    ties = [Tie(f"operand {i}", i, ((0, i),)) for i in range(len(op.ins))]
    return ties + [Tie(f"result {k}", outputs=((0, k),), result=k) for k in range(len(op.outs))]


def _shard_map(op: Op) -> list[Tie]:
    ins, outs = op.params["in_dims"], op.params["out_dims"]
    return [Tie(f"operand {i}", i, ((0, i),), manual=dims) for i, dims in enumerate(ins)] + [
        Tie(f"result {k}", outputs=((0, k),), result=k, manual=dims) for k, dims in enumerate(outs)
    ]


CONTROL: dict[str, Callable[[Op], list[Tie]]] = {
    "scan": _scan, "while": _while, "cond": _cond, "remat": _remat, "shard_map": _shard_map,
}  # fmt: skip


def ties(op: Op) -> list[Tie]:
    """The ties of a control-flow op."""
    return CONTROL[op.name](op)


@dataclasses.dataclass(slots=True)
class Boundary:
    """The shardings of all values around the bodies of an op; `roles` are what the outputs are for.

    `inputs`, `outputs` and `roles` have a list for each body.
    """

    operands: list[Sharding]
    inputs: list[list[Sharding]]
    outputs: list[list[Sharding]]
    results: list[Sharding]
    roles: list[list[str]]

    @classmethod
    def of(cls, op: Op, shardings: Mapping[Value, Sharding], mesh: Mesh) -> "Boundary":
        """All values of a tie get one sharding, the rest is whole."""

        def whole(values: Sequence[Operand]) -> list[Sharding]:
            return [Sharding.replicated(len(x.shape)) for x in values]

        made = cls(
            whole(op.ins),
            [whole(body.ins) for body in op.bodies],
            [whole(body.outs) for body in op.bodies],
            whole(op.outs),
            [[f"{op.name}'s condition"] * len(body.outs) for body in op.bodies],
        )
        for tie in ties(op):
            dims = tie.split(op, shardings, mesh)
            outer = tie.outside(dims, mesh)
            for b, i in tie.inputs:
                made.inputs[b][i] = Sharding(dims)
            for b, i in tie.outputs:
                made.outputs[b][i] = Sharding(dims)
                made.roles[b][i] = f"{op.name} {tie.role}"
            if tie.operand is not None:
                made.operands[tie.operand] = outer
            if tie.result is not None:
                made.results[tie.result] = outer
        return made


def handed_out(op: Op) -> Iterator[tuple[int, int]]:
    """The results that come of one output of the only body and of nothing else, with that output.

    They may owe what the output owes.
    """
    if len(op.bodies) == 1:
        for tie in ties(op):
            if not tie.inputs and tie.result is not None and not tie.manual:
                yield tie.result, tie.outputs[0][1]


@dataclasses.dataclass(frozen=True, slots=True)
class Accumulator:
    """A carry of a scan to which each step adds `summands`, and that is not used otherwise.

    It is `operand` of the op, `input` and `output` of the body, and result `output` of the op.
    """

    operand: int
    input: int
    output: int
    summands: tuple[Value, ...]


def accumulators(op: Op) -> list[Accumulator]:
    """The carries of a scan that only accumulate: what their summands owe can be paid after it."""
    if op.name != "scan":
        return []
    (body,) = op.bodies
    uses = collections.Counter(
        x for using in body.ops for x in using.ins if isinstance(x, Value)
    ) + collections.Counter(x for x in body.outs if isinstance(x, Value))
    made = {out: making for making in body.ops for out in making.outs}
    first = op.params["num_consts"]
    found: list[Accumulator] = []
    for k in range(op.params["num_carry"]):
        summands = _summands(body.ins[first + k], body.outs[k], made, uses)
        if summands:
            found.append(Accumulator(first + k, first + k, k, summands))
    return found


def _summands(
    carry: Value, total: Operand, made: Mapping[Value, Op], uses: Mapping[Value, int]
) -> tuple[Value, ...]:
    """What is added to `carry` until it is `total`; nothing if anything else is done with it."""
    path = _additions(carry, total, made)
    values = [out for op in path for out in op.outs]
    if not path or any(uses[x] > 1 for x in (carry, *values)):
        return ()
    on_path = {carry, *values}
    added = [x for op in path for x in op.ins if x not in on_path]
    if all(isinstance(x, Value) and x.shape == carry.shape for x in added):
        return tuple(x for x in added if isinstance(x, Value))
    return ()


def _additions(carry: Value, total: Operand, made: Mapping[Value, Op]) -> list[Op]:
    """The additions that lead from `carry` to `total`, if these alone do."""
    op = made.get(total) if isinstance(total, Value) else None
    if op is None or not (op.name in ("add", "add_any") or _changes_nothing(op)):
        return []
    for x in op.ins:
        if x == carry:
            return [op]
        if before := _additions(carry, x, made):
            return [*before, op]
    return []


def _changes_nothing(op: Op) -> bool:
    """A conversion to the same type, which JAX writes to forget that a number was Python's."""
    return op.name == "convert_element_type" and op.ins[0].dtype == op.outs[0].dtype
