"""Propagation: from the few shardings that the user gave to one for every value.

A fixed point over factor rules (GSPMD, section 3.5). Each op is an *edge* between values; along an
edge an axis travels from a dim to every dim with the same factor, unless that dim is closed by the
user, or the axis is already taken in that tensor. Shardings only grow, so it ends. Levels decide who
comes first: pointwise ops and data movement (0), contractions and all else (1), broadcasts backward
(2) and forward (3). Every (value, dim, axis) remembers where it came from.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

from gspmd.ir import Op, Operand, Program, Source, Value
from gspmd.rules import factor_rule
from gspmd.rules.control import CONTROL, ties
from gspmd.rules.factor import FactorRule
from gspmd.sharding import Axes, Constraint, Mesh, Sharding, itemsize

Place = tuple[Value, int, str]  # a mesh axis on a dim of a value


@dataclasses.dataclass(frozen=True, slots=True)
class Origin:
    """Who put a mesh axis on a dim: the user (`parent` is None), or an op, from another place."""

    kind: str  # "input", "annotation", "op"
    label: str  # the op's name, or what the user wrote
    source: Source | None
    parent: Place | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Propagated:
    """A sharding for every value of a program, bodies included, with the origin of each axis.

    `refinements` are cuts (axis, major size) of mesh axes into sub-axes which would let a reshape
    keep more of a split; the caller may refine the mesh and propagate again.
    """

    shardings: Mapping[Value, Sharding]
    origins: Mapping[Place, Origin]
    refinements: tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class _Edge:
    rule: FactorRule
    ins: tuple[Operand, ...]
    outs: tuple[Operand, ...]
    label: str
    source: Source | None


def project(
    axes: Axes, factors: tuple[int, ...], sizes: Sequence[int], mesh: Mesh
) -> tuple[dict[int, Axes], tuple[str, int] | None]:
    """Splits the axes of one dim among its factors, major first.

    A dim of several factors hands axes on to the next factor only when the one before is split
    completely, since the pieces would not be contiguous otherwise. Returns the axes of each factor
    and, where only part of an axis fits, the cut (axis, major size) that would make it fit.
    """
    if len(factors) == 1:
        return {factors[0]: axes}, None
    split: dict[int, Axes] = {}
    rest = list(axes)
    for f in factors:
        room = sizes[f]
        got: list[str] = []
        while rest and room > 1:
            k = mesh.size((rest[0],))
            if room % k:
                split[f] = tuple(got)
                cut = math.gcd(room, k)
                return split, (rest[0], cut) if 1 < cut < k else None
            got.append(rest.pop(0))
            room //= k
        split[f] = tuple(got)
        if room > 1:
            break
    return split, None


def propagate(program: Program, mesh: Mesh, fixed: Mapping[Value, Constraint]) -> Propagated:
    """Completes the sharding of every value of `program`.

    `fixed` are the inputs whose dims the user set (None = open); `constraint` ops in the program fix
    their results likewise. What is fixed never changes.
    """
    return _Propagation(program, mesh, fixed).run()


class _Propagation:
    def __init__(self, program: Program, mesh: Mesh, fixed: Mapping[Value, Constraint]) -> None:
        self.mesh = mesh
        self.dims: dict[Value, list[Axes]] = {}
        self.used: dict[Value, set[str]] = {}
        self.closed: dict[Value, tuple[bool, ...]] = {}
        self.origins: dict[Place, Origin] = {}
        self.edges: list[_Edge] = []
        self.edges_of: dict[Value, list[int]] = collections.defaultdict(list)
        self.refinements: dict[tuple[str, int], None] = {}
        self._collect(program)
        for value, constraint in fixed.items():
            self._fix(value, constraint, Origin("input", f"the spec of {value}", None))

    def run(self) -> Propagated:
        for level in range(4):
            self._fixed_point(level)
        shardings = {value: Sharding(tuple(dims)) for value, dims in self.dims.items()}
        return Propagated(shardings, self.origins, tuple(self.refinements))

    def _collect(self, program: Program) -> None:
        for value in (*program.ins, *(value for value, _ in program.consts)):
            self._declare(value)
        for op in program.ops:
            for value in op.outs:
                self._declare(value)
            for body in op.bodies:
                self._collect(body)
            for edge in _edges(op):
                for x in (*edge.ins, *edge.outs):
                    if isinstance(x, Value):
                        touching = self.edges_of[x]
                        if not touching or touching[-1] != len(self.edges):
                            touching.append(len(self.edges))
                self.edges.append(edge)
            if op.name == "constraint":
                label = op.params["label"]
                self._fix(op.outs[0], op.params["dims"], Origin("annotation", label, op.source))

    def _declare(self, value: Value) -> None:
        self.dims[value] = [()] * len(value.shape)
        self.used[value] = set()

    def _fix(self, value: Value, constraint: Constraint, origin: Origin) -> None:
        self.closed[value] = tuple(axes is not None for axes in constraint)
        for dim, named in enumerate(constraint):
            parts = (part for axis in named or () for part in self.mesh.sub_axes(axis))
            axes = tuple(part for part in parts if self.mesh.size((part,)) > 1)
            if axes:
                self.dims[value][dim] = axes
                self.used[value].update(axes)
                for axis in axes:
                    self.origins[value, dim, axis] = origin

    def _fixed_point(self, level: int) -> None:
        queue = collections.deque(range(len(self.edges)))
        queued = [True] * len(self.edges)
        while queue:
            i = queue.popleft()
            queued[i] = False
            for value in self._visit(self.edges[i], level):
                for j in self.edges_of[value]:
                    if not queued[j]:
                        queued[j] = True
                        queue.append(j)

    def _visit(self, edge: _Edge, level: int) -> list[Value]:
        """Carries axes along one edge; returns the values that changed."""
        tensors = (*edge.ins, *edge.outs)
        if not any(isinstance(x, Value) and self.used[x] for x in tensors):
            return []
        changed: list[Value] = []
        forward, backward = edge.rule.forward <= level, edge.rule.backward <= level
        count = len(edge.ins)
        factor_dims = (*edge.rule.ins, *edge.rule.outs)
        proposals = self._proposals(edge, tensors, factor_dims)
        for t, x in enumerate(tensors):
            if not isinstance(x, Value):
                continue
            for dim, factors in enumerate(factor_dims[t]):
                wanted = self._wanted(edge.rule, factors, proposals, t, count, forward, backward, level)
                if wanted and self._extend(edge, x, dim, factors, wanted):
                    changed.append(x)
        return changed

    def _proposals(
        self, edge: _Edge, tensors: Sequence[Operand], factor_dims: Sequence[tuple[tuple[int, ...], ...]]
    ) -> dict[int, list[tuple[float, int, int, Axes]]]:
        """Per factor: (-bytes, tensor, dim, axes) of every tensor that splits it, largest first."""
        found: dict[int, list[tuple[float, int, int, Axes]]] = {}
        for t, x in enumerate(tensors):
            if not isinstance(x, Value) or not self.used[x]:
                continue
            weight = -math.prod(x.shape) * itemsize(x.dtype)
            for dim, factors in enumerate(factor_dims[t]):
                axes = self.dims[x][dim]
                if not axes or not factors:
                    continue
                split, cut = project(axes, factors, edge.rule.sizes, self.mesh)
                if cut is not None:
                    self.refinements[cut] = None
                for f, part in split.items():
                    if part and edge.rule.kinds[f] != "whole":
                        found.setdefault(f, []).append((weight, t, dim, part))
        for offers in found.values():
            offers.sort()
        return found

    def _wanted(
        self,
        rule: FactorRule,
        factors: tuple[int, ...],
        proposals: dict[int, list[tuple[float, int, int, Axes]]],
        target: int,
        count: int,
        forward: bool,
        backward: bool,
        level: int,
    ) -> list[tuple[str, int, int]]:
        """The axes that this dim should have, each with the (tensor, dim) that proposes it."""
        wanted: list[tuple[str, int, int]] = []
        for f in factors:
            best: Axes = ()
            room = rule.sizes[f]
            for _, t, dim, axes in proposals.get(f, ()):
                if t < count <= target:
                    allowed = forward
                elif target < count <= t:
                    allowed = backward
                elif t == target:
                    allowed = True  # what it has is part of what it should have
                else:  # between operands, or between results: only where no result holds the factor
                    allowed = level >= 1 and (target >= count or rule.kinds[f] != "pass")
                if allowed and len(axes) > len(best) and axes[: len(best)] == best:
                    wanted += [(axis, t, dim) for axis in axes[len(best) :]]
                    best = axes
            k = self.mesh.size(best)
            if len(factors) > 1 and room != k:
                break
        return wanted

    def _extend(
        self,
        edge: _Edge,
        value: Value,
        dim: int,
        factors: tuple[int, ...],
        wanted: list[tuple[str, int, int]],
    ) -> bool:
        """Adds the wanted axes that fit on `dim`; True if there was one."""
        closed = self.closed.get(value)
        if closed is not None and closed[dim]:
            return False
        have = self.dims[value][dim]
        if len(wanted) <= len(have) or tuple(a for a, _, _ in wanted[: len(have)]) != have:
            return False
        tensors = (*edge.ins, *edge.outs)
        grown = have
        for axis, t, source_dim in wanted[len(have) :]:
            if axis in self.used[value] or self.mesh.size((*grown, axis)) > value.shape[dim]:
                break
            if len(factors) > 1:
                split, cut = project((*grown, axis), factors, edge.rule.sizes, self.mesh)
                if sum(map(len, split.values())) <= len(grown):
                    if cut is not None:
                        self.refinements[cut] = None
                    break
            grown = (*grown, axis)
            self.used[value].add(axis)
            origin = tensors[t]
            assert isinstance(origin, Value)
            self.origins[value, dim, axis] = Origin(
                "op", edge.label, edge.source, (origin, source_dim, axis)
            )
        self.dims[value][dim] = grown
        return grown != have


def _edges(op: Op) -> Iterator[_Edge]:
    if op.name in CONTROL:
        for tie in ties(op):
            label = f"{op.name} {tie.role}"
            yield _Edge(tie.rule(op), tie.ins(op), tie.outs(op), label, op.source)
    else:
        yield _Edge(factor_rule(op), op.ins, op.outs, op.name, op.source)

