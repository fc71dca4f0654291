"""Placements: which physical rings and groups the axes of a mesh are."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gspmd.errors import MeshError, nearest
from gspmd.meshes.topology import Topology
from gspmd.sharding import Mesh, root_axis


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """What an axis takes of a level: `size` units, each `stride` units from the next."""

    level: str
    size: int
    stride: int = 1

    def __str__(self) -> str:
        return f"{self.size} of {self.level}" + (f" / {self.stride}" if self.stride > 1 else "")


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the axes of `mesh` lie in `topology`: the parts of each axis, major first.

    Together the parts cover each level once: its units are numbered in mixed radix by the parts'
    strides.
    """

    mesh: Mesh
    topology: Topology
    parts: Mapping[str, tuple[Part, ...]]

    def __post_init__(self) -> None:
        check_fits(self.mesh, self.topology)
        for axis in self.parts:
            if axis not in self.mesh.names:
                raise MeshError(
                    f"parts are given for {axis!r}, which is no axis of the mesh {self.mesh}"
                    f"{nearest(axis, self.mesh.names)}"
                )
        for axis, size in self.mesh.axes:
            taken = math.prod(part.size for part in self.parts.get(axis, ()))
            if taken != size:
                raise MeshError(
                    f"mesh axis {axis!r} has size {size}, but its parts hold {taken}: "
                    f"{_show(self.parts.get(axis, ()))}."
                )
        for parts in self.parts.values():
            for part in parts:
                self.topology.level(part.level)
        for level in self.topology.levels:
            self._check_covered(level.name, level.size)

    def _check_covered(self, level: str, size: int) -> None:
        """Raises unless the parts of `level` number its units in mixed radix."""
        parts = sorted(
            (part.stride, part.size, axis)
            for axis, parts in self.parts.items()
            for part in parts
            if part.level == level and part.size > 1
        )
        reached = 1
        for stride, n, axis in parts:
            if stride != reached:
                raise MeshError(
                    f"mesh axis {axis!r} takes {n} units of level {level!r} with stride {stride}, "
                    f"but the parts below it hold {reached} of its {size}: give stride {reached}."
                )
            reached *= n
        if reached != size:
            raise MeshError(
                f"level {level!r} of {self.topology} has {size} units, but the axes of the mesh "
                f"take {reached} of them."
            )

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.mesh, self.topology, *self.parts.values()))

    def refined(self, mesh: Mesh) -> "Placement":
        """The same devices in the same order under `mesh`, whose axes are sub-axes of this one's.

        Raises:
          MeshError: a sub-axis is no whole part of the levels that its axis spans.
        """
        if mesh == self.mesh:
            return self
        parts: dict[str, tuple[Part, ...]] = {}
        for axis, _ in self.mesh.axes:
            cut = mesh.sub_axes(root_axis(axis)) if axis not in mesh.names else (axis,)
            sizes = [(name, mesh.size((name,))) for name in cut]
            parts |= _cut(axis, self.parts.get(axis, ()), sizes)
        return Placement(mesh, self.topology, parts)

    def device_array(self) -> np.ndarray:
        """The numbers of the devices, shaped like the mesh."""
        stride = {x.name: self.topology.below(k) for k, x in enumerate(self.topology.levels)}
        array = np.zeros((), np.int64)
        for axis, _ in self.mesh.axes:
            along = np.zeros(1, np.int64)
            for part in self.parts.get(axis, ()):
                step = np.arange(part.size) * (part.stride * stride[part.level])
                along = (along[:, None] + step).ravel()
            array = array[..., None] + along
        return array

    def arranged(self, devices: Sequence[Any]) -> np.ndarray:
        """`devices`, shaped like the mesh; they may be listed in any order.

        Raises:
          MeshError: there are more or fewer devices than the topology has.
        """
        if len(devices) != self.topology.devices:
            raise MeshError(
                f"{self.topology} has {self.topology.devices} devices, but {len(devices)} are "
                "given; give just those."
            )
        ordered = np.empty(len(devices), object)
        ordered[:] = sorted(devices, key=_place)
        return ordered[self.device_array()]

    def jax_mesh(self, devices: Sequence[Any]) -> jax.sharding.Mesh:
        """The mesh of `devices` as JAX has it; see `arranged`."""
        return jax.sharding.Mesh(self.arranged(devices), self.mesh.names)

    def hosts(self, axes: Iterable[str]) -> tuple[str, ...]:
        """The levels of the hosts' network that `axes` span, innermost first."""
        used = {part.level for axis in axes for part in self.parts.get(axis, ()) if part.size > 1}
        return tuple(x.name for x in self.topology.levels if x.hosts and x.name in used)

    def __str__(self) -> str:
        lines = (
            f"{axis}={size}: {_show(self.parts.get(axis, ()))}" for axis, size in self.mesh.axes
        )
        return f"{self.topology}\n" + "\n".join(f"  {line}" for line in lines)


def _place(device: Any) -> tuple[int, ...]:
    """Where `device` stands in the order of a topology: z, y, x, core of a TPU, else its number."""
    coords = getattr(device, "coords", None)
    if coords is None:
        return (device.id,)
    return (
        getattr(device, "slice_index", None) or 0,
        *reversed(coords),
        getattr(device, "core_on_chip", 0),
    )


def _show(parts: Iterable[Part]) -> str:
    return " x ".join(map(str, parts)) or "nothing"


def check_fits(mesh: Mesh, topology: Topology) -> None:
    """Raises MeshError unless `mesh` has as many devices as `topology`."""
    if mesh.devices != topology.devices:
        show = "1 device" if topology.chip.devices == 1 else f"{topology.chip.devices} devices"
        raise MeshError(
            f"mesh {mesh} has {mesh.devices} devices, but topology {topology} has "
            f"{topology.devices} ({topology.chips} chips of {show}); give sizes whose product "
            f"is {topology.devices}."
        )


def _cut(
    axis: str, parts: Sequence[Part], sizes: Sequence[tuple[str, int]]
) -> dict[str, tuple[Part, ...]]:
    """The parts of each sub-axis in `sizes`, major first, of the axis that has `parts`."""
    left = [part for part in parts if part.size > 1]
    result: dict[str, tuple[Part, ...]] = {}
    for name, size in sizes:
        mine: list[Part] = []
        need = size
        while need > 1:
            part = left.pop(0)
            taken = math.gcd(need, part.size)
            if taken < min(need, part.size):
                raise MeshError(
                    f"mesh axis {axis!r} lies as {_show(parts)}, of which its sub-axis {name!r} of "
                    f"size {size} is no whole part; place it by hand, on levels that it divides."
                )
            rest = part.size // taken
            mine.append(Part(part.level, taken, part.stride * rest))
            if rest > 1:
                left.insert(0, Part(part.level, rest, part.stride))
            need //= taken
        result[name] = tuple(mine)
    return result
