"""Propagation: from the few shardings that the user gave to one for every value.

A fixed point over factor rules (GSPMD, section 3.5). Each op is an *edge* between values; along
an edge an axis travels from a dim to every dim with the same factor, unless that dim is closed by
the user, or the axis is already taken in that tensor. Shardings only grow, so it ends. Levels
decide who comes first: pointwise ops and data movement (0), contractions and all else (1),
broadcasts backward (2) and forward (3). Every (value, dim, axis) remembers where it came from.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

from gspmd.ir import Op, Operand, Program, Source, Value
from gspmd.rules import factor_rule
from gspmd.rules.control import CONTROL, manual_axes, manual_places, ties
from gspmd.rules.factor import Dims, FactorRule
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
class _Tensor:
    """One end of an edge: a value, the factors of its dims, and on which side of the op it is."""

    value: Value
    factors: Dims
    is_result: bool
    bytes: float


@dataclasses.dataclass(frozen=True, slots=True)
class _Edge:
    """An op, or one tie of a control-flow op. `aligned`: all tensors have the same factors."""

    rule: FactorRule
    tensors: tuple[_Tensor, ...]
    aligned: bool
    label: str
    source: Source | None


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class _Offer:
    """A tensor of an edge that splits a factor; the largest tensor comes first."""

    minus_bytes: float
    tensor: int
    dim: int
    axes: Axes


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

    `fixed` are the inputs whose dims the user set (None = open); `constraint` ops in the program
    fix their results likewise. What is fixed never changes.
    """
    return _Propagation(program, mesh, fixed).run()


class _Propagation:
    """The state of one fixed point; `propagate` is its only user."""

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

    def _collect(self, program: Program, manual: Axes = ()) -> None:
        """Takes in a program that runs on shards along `manual`, which split nothing in it."""
        for value in (*program.ins, *(value for value, _ in program.consts)):
            self._declare(value, manual)
        for op in program.ops:
            for value in op.outs:
                self._declare(value, manual)
            for value, dims in manual_places(op, self.mesh):
                self._enter(op, value, dims)
            for body in op.bodies:
                self._collect(body, (*manual, *manual_axes(op, self.mesh)))
            for edge in _edges(op):
                for value in dict.fromkeys(tensor.value for tensor in edge.tensors):
                    self.edges_of[value].append(len(self.edges))
                self.edges.append(edge)
            if op.name == "constraint":
                label = f"{op.params['label']} {op.params['spec']}".strip()
                self._fix(op.outs[0], op.params["dims"], Origin("annotation", label, op.source))

    def _declare(self, value: Value, manual: Axes) -> None:
        self.dims[value] = [()] * len(value.shape)
        self.used[value] = set(manual)

    def _enter(self, op: Op, value: Value, dims: Sequence[Axes]) -> None:
        """Splits an operand or result of a manual region as the region says, and no further."""
        self.dims[value] = list(dims)
        self.used[value].update(manual_axes(op, self.mesh))
        for dim, axes in enumerate(dims):
            for axis in axes:
                self.origins[value, dim, axis] = Origin("annotation", op.name, op.source)

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
        queued = [_wakes(edge, level) for edge in self.edges]
        queue = collections.deque(i for i, waiting in enumerate(queued) if waiting)
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
        if edge.aligned:
            first = self.dims[edge.tensors[0].value]
            if all(self.dims[tensor.value] == first for tensor in edge.tensors[1:]):
                return []
        offers = self._offers(edge)
        if not offers:
            return []
        changed: list[Value] = []
        for t, tensor in enumerate(edge.tensors):
            for dim, factors in enumerate(tensor.factors):
                wanted = self._wanted(edge, t, factors, offers, level)
                if wanted and self._extend(edge, tensor, dim, wanted):
                    changed.append(tensor.value)
        return changed

    def _offers(self, edge: _Edge) -> dict[int, list[_Offer]]:
        """Who splits each factor now."""
        found: dict[int, list[_Offer]] = {}
        kinds = edge.rule.kinds
        for t, tensor in enumerate(edge.tensors):
            if not self.used[tensor.value]:
                continue
            dims = self.dims[tensor.value]
            for dim, factors in enumerate(tensor.factors):
                axes = dims[dim]
                if not axes or not factors:
                    continue
                for f, part in self._project(axes, factors, edge.rule).items():
                    if part and kinds[f] != "whole":
                        found.setdefault(f, []).append(_Offer(-tensor.bytes, t, dim, part))
        for offers in found.values():
            offers.sort()
        return found

    def _project(self, axes: Axes, factors: tuple[int, ...], rule: FactorRule) -> dict[int, Axes]:
        split, cut = project(axes, factors, rule.sizes, self.mesh)
        if cut is not None:
            self.refinements[cut] = None
        return split

    def _wanted(
        self,
        edge: _Edge,
        target: int,
        factors: tuple[int, ...],
        offers: Mapping[int, list[_Offer]],
        level: int,
    ) -> list[tuple[str, int, int]]:
        """The axes that a dim of the target should have, each with the (tensor, dim) offering it.

        The first offer leads; another counts where it goes on from there.
        """
        wanted: list[tuple[str, int, int]] = []
        for f in factors:
            best: Axes = ()
            for offer in offers.get(f, ()):
                axes = offer.axes
                if (
                    len(axes) > len(best)
                    and axes[: len(best)] == best
                    and self._may_travel(edge, offer.tensor, target, f, level)
                ):
                    wanted += [(axis, offer.tensor, offer.dim) for axis in axes[len(best) :]]
                    best = axes
            if len(factors) > 1 and edge.rule.sizes[f] != self.mesh.size(best):
                break  # the next factor's pieces would not be contiguous
        return wanted

    def _may_travel(self, edge: _Edge, source: int, target: int, f: int, level: int) -> bool:
        """Whether at this level an axis goes from one tensor of an edge to another."""
        if source == target:
            return True  # what it has is part of what it should have
        was_result = edge.tensors[source].is_result
        if was_result != edge.tensors[target].is_result:
            return (edge.rule.backward if was_result else edge.rule.forward) <= level
        # Between operands only what no result passes on: a contracted factor.
        return level >= 1 and (was_result or edge.rule.kinds[f] != "pass")

    def _extend(
        self, edge: _Edge, tensor: _Tensor, dim: int, wanted: list[tuple[str, int, int]]
    ) -> bool:
        """Adds the wanted axes that fit on `dim`; True if there was one."""
        value, factors = tensor.value, tensor.factors[dim]
        have = self.dims[value][dim]
        if len(wanted) <= len(have) or self.closed.get(value, _OPEN)[dim : dim + 1] == (True,):
            return False
        if tuple(axis for axis, _, _ in wanted[: len(have)]) != have:
            return False
        grown = have
        for axis, t, source_dim in wanted[len(have) :]:
            longer = (*grown, axis)
            if axis in self.used[value] or self.mesh.size(longer) > value.shape[dim]:
                break
            if len(factors) > 1:
                split = self._project(longer, factors, edge.rule)
                if sum(map(len, split.values())) < len(longer):
                    break
            grown = longer
            self.used[value].add(axis)
            parent = (edge.tensors[t].value, source_dim, axis)
            self.origins[value, dim, axis] = Origin("op", edge.label, edge.source, parent)
        self.dims[value][dim] = grown
        return grown != have


_OPEN: tuple[bool, ...] = ()


def _wakes(edge: _Edge, level: int) -> bool:
    """Whether an edge may carry more at `level` than at the level before."""
    contracts = level == 1 and any(kind != "pass" for kind in edge.rule.kinds)
    return contracts or level in (0, edge.rule.forward, edge.rule.backward)


def _edges(op: Op) -> Iterator[_Edge]:
    if op.name not in CONTROL:
        yield _edge(factor_rule(op), op.ins, op.outs, op.name, op.source)
        return
    for tie in ties(op):
        yield _edge(tie.rule(op), tie.ins(op), tie.outs(op), f"{op.name} {tie.role}", op.source)


def _edge(
    rule: FactorRule,
    ins: Sequence[Operand],
    outs: Sequence[Operand],
    label: str,
    source: Source | None,
) -> _Edge:
    sides = (*zip(ins, rule.ins, strict=True), *zip(outs, rule.outs, strict=True))
    tensors = tuple(
        _Tensor(x, dims, i >= len(ins), math.prod(x.shape) * itemsize(x.dtype))
        for i, (x, dims) in enumerate(sides)
        if isinstance(x, Value) and x.shape
    )
    aligned = bool(tensors) and all(t.factors == tensors[0].factors for t in tensors)
    return _Edge(rule, tensors, aligned, label, source)
