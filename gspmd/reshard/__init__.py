"""Resharding: from one sharding to another by the cheapest sequence of collectives.

`ways` knows the sequences and what each costs; here, what is asked of them.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gspmd.errors import SpecError
from gspmd.reshard.turns import Step, Tensor, Way
from gspmd.reshard.ways import cheapest
from gspmd.sharding import Mesh, Sharding, itemsize, show_axes, show_type
from gspmd.specs import AnyMesh, check_same_mesh, read_mesh, resolve

Shape = tuple[int, ...]


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
    tensor = Tensor(shape, itemsize(dtype), mesh)
    return _plan(tensor, dtype, src, _search(tensor, src, dst))


def _plan(tensor: Tensor, dtype: Any, src: Sharding, way: Way) -> ReshardPlan:
    wire = sum(step.wire_bytes for step in way)
    return ReshardPlan(tensor.shape, dtype, way, wire, tensor.peak(src, way))


def reshard_cost(shape: Shape, dtype: Any, mesh: Mesh, src: Sharding, dst: Sharding) -> float:
    """Wire bytes of the cheapest way from `src` to `dst`."""
    if src == dst or not (src.partial or src.axes):
        return 0.0
    return _cost(Tensor(shape, itemsize(dtype), mesh), src, dst)


@functools.lru_cache(maxsize=1 << 16)
def _cost(tensor: Tensor, src: Sharding, dst: Sharding) -> float:
    return sum(step.wire_bytes for step in _search(tensor, src, dst))


@functools.lru_cache(maxsize=1 << 16)
def _search(tensor: Tensor, src: Sharding, dst: Sharding) -> Way:
    if src == dst:
        return ()
    return cheapest(tensor, src, dst, max(tensor.bytes(src), tensor.bytes(dst)))


def reshard_plan(
    shape: Shape,
    dtype: Any,
    mesh: AnyMesh,
    src: P | NamedSharding,
    dst: P | NamedSharding,
    memory_limit: float | None = None,
) -> ReshardPlan:
    """The cheapest way from one sharding of a tensor to another, step by step.

    Args:
      shape: the logical shape.
      dtype: of the elements.
      mesh: as `gspmd.plan` takes it.
      src, dst: specs with mesh axes; `P("x", unreduced={"y"})` still owes a sum over y.
      memory_limit: bytes of the tensor that a device may hold between two steps; the larger of what
        it holds at first and in the end, if that is None.

    Raises:
      SpecError: a spec does not fit the shape or the mesh, `dst` owes a sum that `src` does not, or
        there is no way within `memory_limit`.
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
    if memory_limit is None:
        return reshard_steps(sizes, kind, logical, start, goal)
    tensor = Tensor(sizes, itemsize(kind), logical)
    plan = _plan(tensor, kind, start, cheapest(tensor, start, goal, memory_limit))
    if plan.peak_bytes > memory_limit:
        raise SpecError(_too_large(plan, tensor, start, goal, memory_limit))
    return plan


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


def _too_large(
    plan: ReshardPlan, tensor: Tensor, src: Sharding, dst: Sharding, limit: float
) -> str:
    held = {"src": tensor.bytes(src), "dst": tensor.bytes(dst)}
    where = max(held, key=lambda side: held[side])
    if held[where] <= limit:
        where = "every way between src and dst"
    types = " -> ".join(show_type(plan.shape, plan.dtype, side) for side in (src, dst))
    return (
        f"{types}: {where} takes {plan.peak_bytes:,.0f} bytes on a device, memory_limit is "
        f"{limit:,.0f}; split {where if where in held else 'both'} over more axes, or raise "
        "memory_limit."
    )
