"""Where to place a mesh: as JAX would, as one says by hand, or as suits the traffic best."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gspmd.errors import MeshError
from gspmd.meshes import network
from gspmd.meshes.network import Traffic
from gspmd.meshes.placement import Part, Placement, check_fits
from gspmd.meshes.topology import Topology
from gspmd.meshes.topology import topology as read_topology
from gspmd.sharding import Axes, Mesh

Sizes = tuple[tuple[int, ...], ...]
"""What each axis of a mesh takes of each level of a topology: [axis][level]."""

Parts = dict[str, tuple[Part, ...]]

_MOST = 20_000
"""Assignments of axes to levels that are looked at; 3 axes on 3 dims of 16 are 120."""

_CLOSER = 8
"""Of these, how many are looked at in every order of the axes on a level."""


def make_mesh(
    shape: Mapping[str, int] | Mesh,
    topology: Topology | str,
    traffic: Sequence[Traffic] | None = None,
    parts: Mapping[str, Sequence[Part | str]] | None = None,
) -> Placement:
    """The placement of a mesh of `shape` in `topology` that is the quickest for `traffic`.

    Without traffic, and where it is as quick, that is what `jax.make_mesh` would choose: the last
    axis has the most whole dims. Two things JAX does otherwise: of TPU v2 and v3 it takes the
    devices as they are listed, and in some slices of up to 16 chips of v5e, v5p, v6e and v7 it has
    a ring of neighbours turn corners, which no parts describe.

    `parts` place it by hand: for each axis what it takes of which level, major first, where the
    name of a level stands for all of it.

    Raises:
      MeshError: the sizes do not fit the topology, or the parts do not fit the sizes.
    """
    topology = read_topology(topology)
    mesh = shape if isinstance(shape, Mesh) else _mesh(shape)
    check_fits(mesh, topology)
    if parts is not None:
        return Placement(
            mesh,
            topology,
            {
                axis: tuple(
                    Part(part, topology.level(part).size) if isinstance(part, str) else part
                    for part in given
                )
                for axis, given in parts.items()
            },
        )
    usual = _parts(mesh, topology, _preferred(mesh, topology), _as_listed(mesh, topology))
    if traffic:
        return Placement(mesh, topology, _quickest(mesh, topology, traffic, usual))
    return Placement(mesh, topology, usual)


def _mesh(shape: Mapping[str, int]) -> Mesh:
    if not isinstance(shape, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise MeshError(
            f'the shape of a mesh is its axes with their sizes, such as {{"data": 8}}, got '
            f"{shape!r} of type {type(shape).__name__}."
        )
    return Mesh(tuple(shape.items()))


def _preferred(mesh: Mesh, topology: Topology) -> Sizes:
    """What `jax.experimental.mesh_utils` would choose.

    The first axes take the hosts' network, as in `create_hybrid_device_mesh`. Of the links within
    a slice, the last axis chooses first: as many whole dims as it can have.
    """
    levels = topology.levels
    left = [size for _, size in mesh.axes]
    free = [level.size for level in levels]
    taken = [[1] * len(levels) for _ in left]
    for k in reversed(range(len(levels))):
        if levels[k].hosts:
            for a, size in enumerate(left):
                n = math.gcd(size, free[k])
                taken[a][k], left[a], free[k] = n, size // n, free[k] // n
    inner = _inner(topology)
    for a in reversed(range(len(left))):
        choices = _factorings(left[a], [free[k] for k in inner])
        best = max(
            choices,
            key=lambda sizes: _whole_first(
                sizes,
                [levels[k].size for k in inner],
                [free[k] for k in inner],
            ),
        )
        for k, n in zip(inner, best, strict=True):
            taken[a][k], free[k] = n, free[k] // n
    return tuple(map(tuple, taken))


def _whole_first(
    sizes: Sequence[int], whole: Sequence[int], free: Sequence[int]
) -> tuple[Any, ...]:
    """JAX's preference among what an axis can take of dims, `whole` before others took of them.

    Whole dims, many of them, then dims that others have begun (`_prefer_first_logical_axis_...`).
    """
    full = [n for n, size in zip(sizes, whole, strict=True) if n == size]
    begun = [n for n, size, left in zip(sizes, whole, free, strict=True) if left < size]
    return math.prod(full), sum(n > 1 for n in full), math.prod(begun), tuple(sizes)


def _factorings(size: int, free: Sequence[int]) -> list[tuple[int, ...]]:
    """Every way to write `size` as a product of divisors of the numbers in `free`, large first."""
    if not free:
        return [()] if size == 1 else []
    common = math.gcd(size, free[0])
    return [
        (n, *rest)
        for n in range(common, 0, -1)
        if common % n == 0
        for rest in _factorings(size // n, free[1:])
    ]


def _inner(topology: Topology) -> list[int]:
    """The levels within a slice or a node, in JAX's order: x, y, z, then the cores of a chip."""
    levels = topology.levels
    torus = [k for k, level in enumerate(levels) if level.torus]
    return torus + [k for k, x in reversed([*enumerate(levels)]) if not x.torus and not x.hosts]


def _major_first(topology: Topology) -> list[int]:
    """The order in which an axis runs through the levels, as JAX has it: slices, x, y, z, cores."""
    levels = topology.levels
    return [k for k in reversed(range(len(levels))) if levels[k].hosts] + _inner(topology)


Orders = tuple[Axes, ...]
"""For each level the axes, major first."""


def _as_listed(mesh: Mesh, topology: Topology) -> Orders:
    return (mesh.names,) * len(topology.levels)


def _parts(mesh: Mesh, topology: Topology, sizes: Sizes, orders: Orders) -> Parts:
    """The parts in which each axis takes `sizes`; on each level the last of its order is minor."""
    taken = dict(zip(mesh.names, sizes, strict=True))
    parts: dict[str, list[Part]] = {axis: [] for axis in mesh.names}
    for k in _major_first(topology):
        level, stride = topology.levels[k].name, topology.levels[k].size
        for axis in orders[k]:
            size = taken[axis][k]
            stride //= size
            if size > 1:
                parts[axis].append(Part(level, size, stride))
    return {axis: tuple(mine) for axis, mine in parts.items()}


def _quickest(mesh: Mesh, topology: Topology, traffic: Sequence[Traffic], usual: Parts) -> Parts:
    """The parts with which `traffic` takes the least time; `usual` unless there are better ones.

    On a level that axes share, the one with the most traffic is the minor one, whose devices are
    neighbours; for the best assignments, other orders are tried, level by level.
    """
    costs = _Costs(mesh, topology, traffic)
    order = (tuple(sorted(mesh.names, key=costs.by_axis(usual).__getitem__)),)
    orders = order * len(topology.levels)
    found = [
        (costs.of(_parts(mesh, topology, sizes, orders)), i, sizes)
        for i, sizes in enumerate(itertools.islice(_assignments(mesh, topology), _MOST))
    ]
    best, least = usual, costs.of(usual) * (1 - 1e-9)
    for cost, _, sizes in sorted(found)[:_CLOSER]:
        cost, parts = _reordered(mesh, topology, sizes, orders, cost, costs)
        if cost < least:
            best, least = parts, cost
    return best


def _assignments(mesh: Mesh, topology: Topology) -> Iterator[Sizes]:
    """Every way in which the axes can take all of the levels."""

    def rest(a: int, free: tuple[int, ...]) -> Iterator[Sizes]:
        if a == len(mesh.axes):
            yield ()
            return
        for mine in _factorings(mesh.axes[a][1], free):
            left = tuple(size // n for size, n in zip(free, mine, strict=True))
            for others in rest(a + 1, left):
                yield (mine, *others)

    return rest(0, tuple(level.size for level in topology.levels))


def _reordered(
    mesh: Mesh, topology: Topology, sizes: Sizes, orders: Orders, cost: float, costs: "_Costs"
) -> tuple[float, Parts]:
    """The cost and the parts after no other order on any one level is better."""
    best = _parts(mesh, topology, sizes, orders)
    better = True
    while better:
        better = False
        for k in range(len(orders)):
            shared = [a for i, a in enumerate(mesh.names) if sizes[i][k] > 1]
            for order in itertools.permutations(shared) if len(shared) > 1 else ():
                others = tuple(a for a in mesh.names if a not in shared)
                tried = (*orders[:k], others + order, *orders[k + 1 :])
                parts = _parts(mesh, topology, sizes, tried)
                if (now := costs.of(parts)) < cost * (1 - 1e-9):
                    best, cost, orders, better = parts, now, tried, True
    return cost, best


class _Costs:
    """Seconds that traffic takes under one placement or another; each thing is computed once."""

    def __init__(self, mesh: Mesh, topology: Topology, traffic: Sequence[Traffic]) -> None:
        self.mesh, self.topology = mesh, topology
        self.rows: dict[Axes, dict[tuple[str, float], int]] = {}
        for row in traffic:
            axes = tuple(dict.fromkeys(row.axes))
            rows = self.rows.setdefault(axes, {})
            rows[row.kind, row.bytes] = rows.get((row.kind, row.bytes), 0) + row.trips
        self.known: dict[tuple[Any, ...], float] = {}

    def of(self, parts: Parts) -> float:
        return sum(self.along(axes, parts) for axes in self.rows)

    def by_axis(self, parts: Parts) -> dict[str, float]:
        """Seconds that each axis has a share in."""
        return {
            axis: sum(self.along(axes, parts) for axes in self.rows if axis in axes)
            for axis in self.mesh.names
        }

    def along(self, axes: Axes, parts: Parts) -> float:
        """Seconds of what goes along `axes`; where the others lie is of no account."""
        key = (axes, *(parts.get(axis) for axis in axes))
        if key not in self.known:
            placement = Placement(self.mesh, self.topology, parts)
            self.known[key] = sum(
                trips * network.seconds(kind, bytes, axes, placement).total
                for (kind, bytes), trips in self.rows[axes].items()
            )
        return self.known[key]
