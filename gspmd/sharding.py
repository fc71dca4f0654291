"""Sharding: which mesh axes split which dim of a tensor, and which reductions are still owed.

Every other module speaks in these two types. `Mesh` is the logical mesh (names and sizes, no
devices); `Sharding` is one tensor's place on it. The notation is the design's: `f32[8@x,16]+y` is
8 rows split over axis x, 16 columns whole, and a sum over axis y still owed.

Uneven dims: a dim of size n split k ways holds `ceil(n / k)` on every device; what lies past n in
the last shards is padding with unspecified content (GSPMD, section 4.1 "static shapes").
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from gspmd.errors import MeshError

Axes = tuple[str, ...]
Constraint = tuple[Axes | None, ...]
"""What a user fixes of a tensor: per dim the axes that split it (`()`: whole), None where open."""


@dataclasses.dataclass(frozen=True, slots=True)
class Mesh:
    """Named axes with their sizes, outermost first. Knows neither devices nor hardware."""

    axes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.axes]
        if len(set(names)) != len(names):
            raise MeshError(f"mesh axes must have distinct names, got {names}.")
        for name, size in self.axes:
            if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise MeshError(
                    f"mesh axis {name!r} has size {size!r}; a size is an int of at least 1."
                )

    @property
    def names(self) -> Axes:
        return tuple(name for name, _ in self.axes)

    @property
    def devices(self) -> int:
        """Number of devices in the whole mesh."""
        return math.prod(size for _, size in self.axes)

    def size(self, axes: Iterable[str]) -> int:
        """Devices along `axes` together; 1 for no axes."""
        return _size(self, tuple(axes))

    def refine(self, axis: str, major: int) -> "Mesh":
        """The same devices with `axis` cut in two: `axis:0` of size `major`, then the rest.

        A sub-axis is cut again into `axis:0`, `axis:1`, `axis:2`, ...: numbered anew, major first.
        """
        root = root_axis(axis)
        size = self.size((axis,))
        if size % major or not 1 < major < size:
            raise MeshError(f"axis {axis!r} of size {size} has no sub-axis of size {major}.")
        parts: list[tuple[str, int]] = []
        for name, k in self.axes:
            if root_axis(name) != root:
                parts.append((name, k))
            elif name == axis:
                parts += [(root, major), (root, k // major)]
            else:
                parts.append((root, k))
        count = 0
        renamed: list[tuple[str, int]] = []
        for name, k in parts:
            if name == root:
                renamed.append((f"{root}:{count}", k))
                count += 1
            else:
                renamed.append((name, k))
        return Mesh(tuple(renamed))

    def without(self, axes: Collection[str]) -> "Mesh":
        """The mesh that is left where `axes` are not to be used."""
        return Mesh(tuple((name, k) for name, k in self.axes if name not in axes))

    def sub_axes(self, axis: str) -> Axes:
        """The axes of this (maybe refined) mesh which together are the user's `axis`."""
        return tuple(name for name in self.names if root_axis(name) == axis)

    def __str__(self) -> str:
        return ", ".join(f"{name}={size}" for name, size in self.axes)


@functools.lru_cache(maxsize=4096)
def _size(mesh: Mesh, axes: Axes) -> int:
    sizes = dict(mesh.axes)
    return math.prod(sizes[axis] for axis in axes)


def root_axis(axis: str) -> str:
    """The user's axis that `axis` is, or is a sub-axis of: `x:1` belongs to `x`."""
    return axis.partition(":")[0]


@dataclasses.dataclass(frozen=True, slots=True)
class Sharding:
    """How one tensor lies on a mesh: axes per dim, major first, and reductions still owed.

    `partial` names the axes over which the devices hold summands (or maxima, ..., see `reduction`)
    of the true value; the true value appears once those axes are reduced. They are listed in the
    order of the mesh, which means nothing. No axis occurs twice.
    """

    dims: tuple[Axes, ...]
    partial: Axes = ()
    reduction: str = "sum"

    @classmethod
    def replicated(cls, rank: int) -> "Sharding":
        return cls(((),) * rank)

    @property
    def axes(self) -> Axes:
        """Every axis that splits a dim, in the order of the dims."""
        return tuple(axis for dim in self.dims for axis in dim)

    @property
    def whole(self) -> "Sharding":
        """The same split with nothing owed."""
        return Sharding(self.dims)

    def with_dim(self, dim: int, axes: Axes) -> "Sharding":
        dims = (*self.dims[:dim], axes, *self.dims[dim + 1 :])
        return Sharding(dims, self.partial, self.reduction)

    def local_shape(self, shape: Sequence[int], mesh: Mesh) -> tuple[int, ...]:
        """What one device holds: ceil(n / k) in each dim."""
        if not any(self.dims):
            return tuple(shape)
        return tuple(
            -(-n // mesh.size(axes)) if axes else n
            for n, axes in zip(shape, self.dims, strict=True)
        )

    def padded_shape(self, shape: Sequence[int], mesh: Mesh) -> tuple[int, ...]:
        """What all shards together hold, padding included."""
        return tuple(
            -(-n // mesh.size(axes)) * mesh.size(axes) if axes else n
            for n, axes in zip(shape, self.dims, strict=True)
        )

    def shards(self, mesh: Mesh) -> int:
        """Number of distinct pieces."""
        return mesh.size(self.axes)

    def __str__(self) -> str:
        dims = ",".join("*" + _at(axes) for axes in self.dims)
        return f"[{dims}]{_owed(self)}"


def show_type(shape: Sequence[int], dtype: Any, sharding: Sharding | None = None) -> str:
    """One sharded type in the design's notation: `f32[8@x,16]+y`."""
    if sharding is None:
        sharding = Sharding.replicated(len(shape))
    dims = ",".join(f"{n}{_at(axes)}" for n, axes in zip(shape, sharding.dims, strict=True))
    return f"{show_dtype(dtype)}[{dims}]{_owed(sharding)}"


def show_dtype(dtype: Any) -> str:
    """`f32`, `bf16`, `i32`, `bool`, `key<fry>`, `f8_e4m3fn`: JAX's short names."""
    name = str(getattr(dtype, "name", dtype))
    for long, short in (
        ("bfloat", "bf"), ("float", "f"), ("uint", "u"), ("int", "i"), ("complex", "c"),
    ):  # fmt: skip
        if name.startswith(long):
            return short + name[len(long) :]
    return name


@functools.lru_cache(maxsize=256)
def itemsize(dtype: Any) -> float:
    """Bytes of one element; half a byte for 4-bit integers; PRNG keys by their words."""
    name = str(getattr(dtype, "name", dtype))
    if name.endswith("int4"):
        return 0.5
    if name.endswith("int2"):
        return 0.25
    if isinstance(dtype, np.dtype):
        return dtype.itemsize
    return float(getattr(dtype, "itemsize", 8))


def merge_sub_axes(axes: Axes) -> Axes:
    """Adjacent sub-axes written as the user's axis when they are listed from the first on.

    Only for printing: whether `x:0` alone is all of `x` cannot be seen without the mesh, so a lone
    sub-axis stays as it is.
    """
    merged: list[str] = []
    i = 0
    while i < len(axes):
        root, _, part = axes[i].partition(":")
        j = i + 1
        if part == "0":
            while j < len(axes) and axes[j] == f"{root}:{j - i}":
                j += 1
        if j - i > 1:
            merged.append(root)
        else:
            merged.append(axes[i])
        i = j
    return tuple(merged)


def show_axes(axes: Axes) -> str:
    """`x`, or `(x,y)` for several."""
    merged = merge_sub_axes(axes)
    return merged[0] if len(merged) == 1 else f"({','.join(merged)})"


def _at(axes: Axes) -> str:
    return f"@{show_axes(axes)}" if axes else ""


def _owed(sharding: Sharding) -> str:
    if not sharding.partial:
        return ""
    kind = "" if sharding.reduction == "sum" else sharding.reduction + " "
    return f"+{kind}{show_axes(sharding.partial)}"
