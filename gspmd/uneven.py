"""Uneven: an array split over devices that do not divide it, as `jax.Array` cannot be.

A dim of 7 split 4 ways is held as 2, 2, 2 and 1 (plus one entry of padding). `jax.Array` has no
such sharding, so a partitioned function hands these out, and takes them back as they are: a
parameter with an uneven dim stays split from step to step, and nothing is gathered in between.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import PartitionSpec as P

from gspmd.sharding import Sharding, show_type


class Uneven(np.lib.mixins.NDArrayOperatorsMixin):
    """An array of logical `shape` whose shards, padding included, are those of `padded`.

    It acts as the array of its logical shape: `np.asarray(u)`, `jnp.asarray(u)`, `u + 1`, `u[3:]`,
    `u.sum()`, `pickle.dumps(u)` (which stores a numpy array). JAX's own functions, `jax.jit` and
    `jnp.sum` alike, know only their own arrays: they take `jnp.asarray(u)`, an ordinary array whose
    uneven dims are gathered, as they are for arithmetic.
    """

    __slots__ = ("padded", "shape")

    padded: jax.Array
    shape: tuple[int, ...]

    def __init__(self, padded: jax.Array, shape: tuple[int, ...]) -> None:
        self.padded = padded
        self.shape = tuple(shape)

    @property
    def dtype(self) -> Any:
        return self.padded.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def sharding(self) -> NamedSharding:
        """The mesh and the spec. What lies where is `addressable_shards`."""
        assert isinstance(self.padded.sharding, NamedSharding)
        return self.padded.sharding

    @property
    def mesh(self) -> DeviceMesh:
        assert isinstance(self.sharding.mesh, DeviceMesh)
        return self.sharding.mesh

    @property
    def spec(self) -> P:
        return self.sharding.spec

    @property
    def addressable_shards(self) -> "tuple[Shard, ...]":
        """What each device of this process holds, without the padding."""
        shards: list[Shard] = []
        for shard in self.padded.addressable_shards:
            index = tuple(
                slice(*part.indices(n)) for part, n in zip(shard.index, self.shape, strict=True)
            )
            held = tuple(slice(max(part.stop - part.start, 0)) for part in index)
            shards.append(Shard(shard.device, index, shard.data[held]))
        return tuple(shards)

    def block_until_ready(self) -> "Uneven":
        self.padded.block_until_ready()
        return self

    def is_deleted(self) -> bool:
        return self.padded.is_deleted()

    def delete(self) -> None:
        self.padded.delete()

    def copy_to_host_async(self) -> None:
        self.padded.copy_to_host_async()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if 0 in self.shape:  # JAX cannot put together shards that hold nothing
            return np.zeros(self.shape, dtype or self.dtype)
        whole = np.asarray(self.padded)[tuple(slice(n) for n in self.shape)]
        return np.array(whole, dtype=dtype, copy=copy)

    def __jax_array__(self) -> jax.Array:
        """The ordinary array: its uneven dims are gathered, the others stay split."""
        mesh = self.mesh
        plain = automatic(mesh)
        with jax.sharding.use_abstract_mesh(plain.abstract_mesh), jax.ensure_compile_time_eval():
            cut = _whole(NamedSharding(plain, self.spec), self.shape)
            return on_mesh(cut(on_mesh(self.padded, plain)), mesh)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *args: Any, **kwargs: Any) -> Any:
        """The result of an operator, a `jax.Array`: by jax.numpy's function of the same name."""
        if method != "__call__":
            return NotImplemented
        kwargs.pop("out", None)  # `u += 1` makes another array, as for any `jax.Array`
        plain = (x.__jax_array__() if isinstance(x, Uneven) else x for x in args)
        return getattr(jnp, ufunc.__name__)(*plain, **kwargs)

    def __getitem__(self, index: Any) -> jax.Array:
        return self.__jax_array__()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # protocols are those that the class defines
            raise AttributeError(name)
        return getattr(self.__jax_array__(), name)

    def __len__(self) -> int:
        return self.shape[0]  # something of it is split, so that it has dims

    def __iter__(self) -> Iterator[jax.Array]:
        return iter(self.__jax_array__())

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return np.asarray, (np.asarray(self),)

    def __repr__(self) -> str:
        return f"Uneven({self.type})"

    def __str__(self) -> str:
        return str(np.asarray(self))

    @property
    def type(self) -> str:
        """In the design's notation: `f32[7@x,16]`."""
        dims = tuple(_axes(entry) for entry in self.spec)
        whole = ((),) * (self.ndim - len(dims))
        return show_type(self.shape, self.dtype, Sharding((*dims, *whole)))


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """One device's part of an array: `data` is `array[index]`."""

    device: Any
    index: tuple[slice, ...]
    data: jax.Array


def automatic(mesh: DeviceMesh) -> DeviceMesh:
    """`mesh` with axes which all are Auto: there, arrays can be cut and padded at will."""
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    return DeviceMesh(mesh.devices, mesh.axis_names, axis_types=kinds)


def on_mesh(x: jax.Array, mesh: DeviceMesh) -> jax.Array:
    """`x`, the same buffers, on another mesh of the same devices and names."""
    assert isinstance(x.sharding, NamedSharding)
    if x.sharding.mesh == mesh:
        return x
    sharding = NamedSharding(mesh, x.sharding.spec)
    buffers = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, sharding, buffers)


def _axes(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


@functools.lru_cache(maxsize=256)
def _whole(sharding: NamedSharding, shape: tuple[int, ...]) -> Callable[[jax.Array], jax.Array]:
    """Cuts the padding off; a dim stays split where its axes divide it."""
    mesh = sharding.mesh
    spec = P(
        *(
            None if n % math.prod(mesh.shape[axis] for axis in _axes(entry)) else entry
            for n, entry in zip(shape, sharding.spec, strict=False)
        )
    )
    where = tuple(slice(n) for n in shape)
    return jax.jit(lambda x: x[where], out_shardings=NamedSharding(mesh, spec))
