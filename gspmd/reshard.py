"""Resharding as a search: from one sharding to another by the cheapest sequence of collectives.

States are shardings, moves are local slices and the five collectives, the cost of a path is its
wire bytes, then its number of steps. No state may hold more per device than the larger of source
and target do (arXiv 2112.01075), unless there is no other way. Gathering everything and slicing is
only ever the result where it is the cheapest path.
"""

import dataclasses
import functools
import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gspmd.collectives import wire_bytes
from gspmd.errors import SpecError
from gspmd.sharding import Axes, Mesh, Sharding, itemsize, show_axes, show_type
from gspmd.specs import AnyMesh, check_same_mesh, read_mesh, resolve

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One move: `kind` over `axes`, after which the tensor is sharded as `dst`.

    `dim` is the dim that is sliced, gathered or scattered; an `all_to_all` moves `axes` from
    `from_dim` to `dim`.
    """

    kind: str
    axes: Axes
    src: Sharding
    dst: Sharding
    dim: int = -1
    from_dim: int = -1
    wire_bytes: float = 0.0

    def __str__(self) -> str:
        return f"{self.kind}[{show_axes(self.axes)}] {self.src} -> {self.dst}"


@dataclasses.dataclass(frozen=True, slots=True)
class ReshardPlan:
    """The steps from one sharding of a tensor to another, with their cost per device.

    `wire_bytes` is what one device sends; `peak_bytes` the most that it holds between two steps.
    """

    shape: Shape
    dtype: Any
    steps: tuple[Step, ...]
    wire_bytes: float
    peak_bytes: float

    def __str__(self) -> str:
        lines = [
            f"{step.kind:<18} {show_axes(step.axes):<8} "
            f"{show_type(self.shape, self.dtype, step.dst)}  {step.wire_bytes:,.0f} B"
            for step in self.steps
        ]
        total = f"wire bytes {self.wire_bytes:,.0f}, peak bytes {self.peak_bytes:,.0f}"
        return "\n".join([*lines, total])


def reshard_steps(
    shape: Shape, dtype: Any, mesh: Mesh, src: Sharding, dst: Sharding
) -> ReshardPlan:
    """The cheapest way from `src` to `dst` for a tensor of logical `shape`."""
    size = itemsize(dtype)
    steps = _search(shape, size, mesh, src, dst)
    states = [src, *(step.dst for step in steps)]
    peak = max(_local_bytes(shape, size, mesh, state) for state in states)
    return ReshardPlan(shape, dtype, steps, sum(step.wire_bytes for step in steps), peak)


def reshard_plan(
    shape: Shape, dtype: Any, mesh: AnyMesh, src: P | NamedSharding, dst: P | NamedSharding
) -> ReshardPlan:
    """The cheapest way from one sharding of a tensor to another, step by step.

    Args:
      shape: the logical shape.
      dtype: of the elements.
      mesh: as `gspmd.plan` takes it.
      src, dst: specs with mesh axes; `P("x", unreduced={"y"})` still owes a sum over y.

    Raises:
      SpecError: a spec does not fit the shape or the mesh, or `dst` owes a sum that `src` does not.
    """
    logical, _ = read_mesh(mesh)
    sizes = _shape(shape)
    try:
        kind = np.dtype(dtype)
    except TypeError as error:
        raise SpecError(
            f"reshard_plan: {dtype!r} is no dtype; write one such as 'float32'."
        ) from error
    start, goal = (_sharding(s, len(sizes), logical, w) for s, w in ((src, "src"), (dst, "dst")))
    if not set(goal.partial) <= set(start.partial):
        raise SpecError(
            f"dst owes a sum over {show_axes(goal.partial)}, src over "
            f"{show_axes(start.partial) if start.partial else 'nothing'}: a whole value has no "
            "summands; drop unreduced from dst."
        )
    return reshard_steps(sizes, kind, logical, start, goal)


def _shape(shape: Any) -> Shape:
    good = isinstance(shape, Sequence) and not isinstance(shape, str)
    if not good or not all(isinstance(n, int | np.integer) and n >= 0 for n in shape):
        raise SpecError(
            f"reshard_plan: {shape!r} is no shape; write the size of each dim: (8, 16)."
        )
    return tuple(int(n) for n in shape)


def _sharding(spec: P | NamedSharding, rank: int, mesh: Mesh, where: str) -> Sharding:
    if isinstance(spec, NamedSharding):
        check_same_mesh(spec, mesh, where)
    elif not isinstance(spec, P):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise SpecError(f"{where} is {spec!r}; write a PartitionSpec such as P('x', None).")
    entries = spec.spec if isinstance(spec, NamedSharding) else spec
    constraint = resolve(P(*entries.partitions), rank, mesh, None, where)
    dims = constraint if constraint is not None else ((),) * rank
    owed = tuple(axis for axis in mesh.names if axis in entries.unreduced)
    if unknown := set(entries.unreduced) - set(owed):
        raise SpecError(f"{where} owes a sum over {sorted(unknown)}, but the mesh has {mesh}.")
    made = Sharding(tuple(axes or () for axes in dims), owed)
    if both := set(made.axes) & set(owed):
        raise SpecError(
            f"{where} splits a dim over {sorted(both)} and owes a sum over it; drop one."
        )
    return made


def reshard_cost(shape: Shape, dtype: Any, mesh: Mesh, src: Sharding, dst: Sharding) -> float:
    """Wire bytes of the cheapest way from `src` to `dst`."""
    if src == dst or not (src.partial or src.axes):
        return 0.0
    return _cost(shape, itemsize(dtype), mesh, src, dst)


@functools.lru_cache(maxsize=1 << 16)
def _cost(shape: Shape, size: float, mesh: Mesh, src: Sharding, dst: Sharding) -> float:
    return sum(step.wire_bytes for step in _search(shape, size, mesh, src, dst))


def block(n: int, axes: Axes, mesh: Mesh) -> int:
    """Elements of a dim of size n on one device."""
    return -(-n // mesh.size(axes)) if axes else n


def nests(n: int, axes: Axes, prefix: Axes, mesh: Mesh) -> bool:
    """Blocks of `axes` lie inside the blocks of `prefix`, so that one step leads between the two.

    Not so for 6 elements over (x=2, y=2): blocks of 2 over (x, y) straddle the blocks of 3 over x.
    """
    rest = axes[len(prefix) :]
    return not prefix or block(n, axes, mesh) * mesh.size(rest) == block(n, prefix, mesh)


def _local_bytes(shape: Shape, size: float, mesh: Mesh, state: Sharding) -> float:
    return math.prod(state.local_shape(shape, mesh)) * size


@functools.lru_cache(maxsize=1 << 16)
def _search(
    shape: Shape, size: float, mesh: Mesh, src: Sharding, dst: Sharding
) -> tuple[Step, ...]:
    if src == dst:
        return ()
    bound = max(_local_bytes(shape, size, mesh, src), _local_bytes(shape, size, mesh, dst))
    for limit in (bound, math.inf):
        steps = _dijkstra(_Problem(shape, size, mesh, dst, limit), src)
        if steps is not None:
            return steps
    raise AssertionError(f"no path from {src} to {dst} for {shape} on {mesh}")


@dataclasses.dataclass(frozen=True, slots=True)
class _Problem:
    shape: Shape
    size: float
    mesh: Mesh
    dst: Sharding
    limit: float  # bytes that a device may hold

    def step(self, kind: str, axes: Axes, src: Sharding, dst: Sharding, **dims: int) -> Step:
        operand = _local_bytes(self.shape, self.size, self.mesh, src)
        if kind in ("reduce_scatter", "all_to_all"):  # the operand is padded to whole pieces first
            operand = max(
                operand,
                _local_bytes(self.shape, self.size, self.mesh, dst)
                * (self.mesh.size(axes) if kind == "reduce_scatter" else 1),
            )
        wire = 0.0 if kind == "slice" else wire_bytes(kind, self.mesh.size(axes), operand)
        return Step(kind, axes, src, dst, wire_bytes=wire, **dims)


def _dijkstra(problem: _Problem, src: Sharding) -> tuple[Step, ...] | None:
    order = itertools.count()
    heap: list[tuple[float, int, int, Sharding]] = [(0.0, 0, next(order), src)]
    best: dict[Sharding, tuple[float, int]] = {src: (0.0, 0)}
    came: dict[Sharding, Step] = {}
    while heap:
        cost, count, _, state = heapq.heappop(heap)
        if state == problem.dst:
            steps: list[Step] = []
            while state != src:
                steps.append(came[state])
                state = came[state].src
            return tuple(reversed(steps))
        if (cost, count) > best[state]:
            continue
        for step in _moves(problem, state):
            held = _local_bytes(problem.shape, problem.size, problem.mesh, step.dst)
            if held > problem.limit:
                continue
            reached = (cost + step.wire_bytes, count + 1)
            if step.dst not in best or reached < best[step.dst]:
                best[step.dst] = reached
                came[step.dst] = step
                heapq.heappush(heap, (*reached, next(order), step.dst))
    return None


def _moves(problem: _Problem, state: Sharding) -> Iterator[Step]:
    yield from _slices(problem, state)
    yield from _reductions(problem, state)
    yield from _gathers(problem, state)
    yield from _exchanges(problem, state)
    yield from _permutes(problem, state)


def _common(a: Axes, b: Axes) -> int:
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


def _slices(problem: _Problem, state: Sharding) -> Iterator[Step]:
    """Splits a dim further along axes over which the tensor is replicated; moves nothing."""
    held = {*state.axes, *state.partial}
    for i, (axes, goal) in enumerate(zip(state.dims, problem.dst.dims, strict=True)):
        n = problem.shape[i]
        tails: list[Axes] = []
        if goal[: len(axes)] == axes and not held.intersection(goal[len(axes) :]):
            tails.append(goal[len(axes) :])
        free = [a for a in problem.dst.axes if a not in held]
        # An axis bound for another dim may ride along on this one until an all_to_all takes both.
        tails += [(a,) for a in free if axes != goal or a in goal]
        for tail in dict.fromkeys(tails):
            if tail and nests(n, axes + tail, axes, problem.mesh):
                yield problem.step("slice", tail, state, state.with_dim(i, axes + tail), dim=i)


def _reductions(problem: _Problem, state: Sharding) -> Iterator[Step]:
    owed = tuple(a for a in state.partial if a not in problem.dst.partial)
    if not owed:
        return
    remaining = [owed, tuple(a for a in owed if a not in problem.dst.axes)]
    for paid in dict.fromkeys(remaining):
        if paid:
            yield problem.step("all_reduce", paid, state, _paid(state, paid))
    if state.reduction != "sum":
        return
    for i, (axes, goal) in enumerate(zip(state.dims, problem.dst.dims, strict=True)):
        wanted = tuple(a for a in goal if a in owed)
        for tail in dict.fromkeys([wanted, *((a,) for a in wanted)]):
            if tail and nests(problem.shape[i], axes + tail, axes, problem.mesh):
                scattered = _paid(state, tail).with_dim(i, axes + tail)
                yield problem.step("reduce_scatter", tail, state, scattered, dim=i)


def _paid(state: Sharding, axes: Axes) -> Sharding:
    rest = tuple(a for a in state.partial if a not in axes)
    return Sharding(state.dims, rest, state.reduction if rest else "sum")


def _gathers(problem: _Problem, state: Sharding) -> Iterator[Step]:
    for i, (axes, goal) in enumerate(zip(state.dims, problem.dst.dims, strict=True)):
        keep = _common(axes, goal)
        n = problem.shape[i]
        lengths = {j for j in range(keep, len(axes)) if nests(n, axes, axes[:j], problem.mesh)}
        if axes != goal and axes and not nests(n, goal, axes, problem.mesh):
            lengths.add(0)
        if axes and len(lengths) < len(axes) - keep:
            lengths.add(0)  # uneven blocks do not nest: only the whole dim is in reach
        for j in sorted(lengths):
            yield problem.step("all_gather", axes[j:], state, state.with_dim(i, axes[:j]), dim=i)


def _exchanges(problem: _Problem, state: Sharding) -> Iterator[Step]:
    for i, axes in enumerate(state.dims):
        for j in range(len(axes)):
            tail = axes[j:]
            if not nests(problem.shape[i], axes, axes[:j], problem.mesh):
                continue
            for k, onto in enumerate(state.dims):
                if k == i or not set(tail) <= set(problem.dst.dims[k]):
                    continue
                if nests(problem.shape[k], onto + tail, onto, problem.mesh):
                    moved = state.with_dim(i, axes[:j]).with_dim(k, onto + tail)
                    yield problem.step("all_to_all", tail, state, moved, dim=k, from_dim=i)


def _permutes(problem: _Problem, state: Sharding) -> Iterator[Step]:
    """Hands whole blocks to other devices: other axes, or another order, but blocks alike."""
    mesh, goal = problem.mesh, problem.dst
    targets: list[Sharding] = []
    if state.partial == goal.partial and state.reduction == goal.reduction:
        targets.append(goal)
    targets.append(
        Sharding(
            tuple(
                tuple(a for a in wanted if a in axes) + tuple(a for a in axes if a not in wanted)
                for axes, wanted in zip(state.dims, goal.dims, strict=True)
            ),
            state.partial,
            state.reduction,
        )
    )
    for target in dict.fromkeys(targets):
        same = all(
            mesh.size(a) == mesh.size(b) for a, b in zip(state.dims, target.dims, strict=True)
        )
        if same and target != state and not set(target.axes) & set(state.partial):
            union = state.axes + tuple(a for a in target.axes if a not in state.axes)
            yield problem.step("collective_permute", union, state, target)


def permutation(step: Step) -> tuple[Axes, Axes]:
    """The orders `src` and `dst` of a `collective_permute`'s axes, as the collective takes them."""
    union = step.axes

    def order(state: Sharding) -> Axes:
        return state.axes + tuple(a for a in union if a not in state.axes)

    return order(step.src), order(step.dst)
