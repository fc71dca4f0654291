"""Program -> callable: on a simulated mesh, on a mesh of devices, or compiled ahead of time.

Both runners execute the same local program (`evaluate`) and differ in where its axes get their
names: `simulate` nests one `jax.vmap` per axis on a single device; an `Executable` is a
`jax.shard_map` over real devices.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import PartitionSpec as P

from gspmd._compat import MANY, MANY_DIMS, is_tracing
from gspmd.collectives import Backend, backend_of
from gspmd.devices import show_mesh
from gspmd.errors import ArgumentError, MeshError
from gspmd.evaluate import evaluate
from gspmd.ir import Layout, Literal, Operand, Program, Value
from gspmd.local import as_words
from gspmd.sharding import Mesh, Sharding, show_type
from gspmd.specs import to_spec
from gspmd.uneven import Uneven, automatic, on_mesh


def simulate(program: Program, mesh: Mesh, args: Sequence[Any]) -> list[jax.Array]:
    """The global outputs of a local `program` on global `args`, computed on one device."""
    return simulator(program, mesh)(*args)


def simulator(program: Program, mesh: Mesh) -> Callable[..., list[jax.Array]]:
    """A callable like the unpartitioned function, that runs every device of `mesh` on one device.

    Each mesh axis is a `jax.vmap`, so that the number of devices is bounded by memory alone.
    """
    run = _jit(lambda *args: [copies[0] for copies in _copies(program, mesh, args)], program, mesh)
    return lambda *args: run(*map(on_one_device, args, program.ins))


def _jit(fn: Callable[..., Any], program: Program, mesh: Mesh) -> Callable[..., Any]:
    """`jax.jit` for a simulation of `program`, whose values have a dim more for each mesh axis."""
    dims = len(mesh.axes) + max(
        (len(x.shape) for op, _ in program.walk() for x in op.outs), default=0
    )
    inner = jax.jit(fn)
    outer = jax.jit(fn, compiler_options=dict(MANY_DIMS)) if dims >= MANY else inner
    # What is being traced takes part in another's compilation, whose options are not ours.
    return lambda *args: (inner if is_tracing() else outer)(*args)


def replicas(
    program: Program, mesh: Mesh, args: Sequence[Any], poison: bool = False
) -> list[jax.Array]:
    """Like `simulate`, with every device's opinion: `out[i]` is the output as group i holds it.

    The devices that hold the same shards must agree on all of them. With `poison`, the padding of
    uneven inputs holds NaN, or the largest number, in place of zeros: no output may show it.
    """
    run = _jit(lambda *args: _copies(program, mesh, args, poison), program, mesh)
    return run(*map(on_one_device, args, program.ins))


def _copies(
    program: Program, mesh: Mesh, args: Sequence[Any], poison: bool = False
) -> list[jax.Array]:
    outs = _stacked(program, mesh, args, poison)
    return [join(x, _layout(out), mesh) for x, out in zip(outs, program.outs, strict=True)]


def stacked(
    program: Program, mesh: Mesh, args: Sequence[Any], poison: bool = False
) -> Sequence[jax.Array]:
    """What every device holds of each output, simulated: `out[i][*mesh, *local shape]`."""
    run = _jit(lambda *args: _stacked(program, mesh, args, poison), program, mesh)
    return run(*map(on_one_device, args, program.ins))


def _stacked(
    program: Program, mesh: Mesh, args: Sequence[Any], poison: bool
) -> Sequence[jax.Array]:
    layouts = [_layout(value) for value in program.ins]
    split = [_split(x, at, mesh, poison) for x, at in zip(args, layouts, strict=True)]
    run: Callable[..., Any] = lambda *xs: tuple(evaluate(program, xs, "simulated"))  # noqa: E731
    for axis, size in reversed(mesh.axes):
        in_axes = tuple(0 if axis in at.sharding.axes else None for at in layouts)
        run = jax.vmap(run, in_axes, 0, axis_name=axis, axis_size=size)
    return run(*split)


def _layout(operand: Operand) -> Layout:
    """How `operand` lies on the mesh; what says nothing of it is whole on every device."""
    if isinstance(operand, Literal) or operand.layout is None:
        return Layout(operand.shape, Sharding.replicated(len(operand.shape)))
    assert not operand.layout.sharding.partial, f"{operand.type} crosses the program's boundary"
    return operand.layout


def _split(x: Any, at: Layout, mesh: Mesh, poison: bool) -> jax.Array:
    """The shards of global `x`: a leading dim for each mesh axis that splits it, in mesh order."""
    words, restore = as_words(jnp.asarray(x))
    widths, cut, blocks = [], [], []
    names: list[str | None] = []
    padded = at.sharding.padded_shape(at.shape, mesh)
    for n, total, axes in zip(at.shape, padded, at.sharding.dims, strict=True):
        widths.append((0, total - n, 0))
        cut += [*(mesh.size((axis,)) for axis in axes), total // mesh.size(axes)]
        names += [*axes, None]
        blocks.append(len(names) - 1)
    trailing = range(words.ndim - len(at.shape))  # the words of a PRNG key
    widths += [(0, 0, 0) for _ in trailing]
    shape = (*cut, *words.shape[len(at.shape) :])
    order = [names.index(axis) for axis in mesh.names if axis in names]
    order += [*blocks, *(len(cut) + i for i in trailing)]
    filler = _poison(words.dtype) if poison else np.zeros((), words.dtype)
    return restore(lax.pad(words, filler, widths).reshape(shape).transpose(order))


def join(x: jax.Array, at: Layout, mesh: Mesh) -> jax.Array:
    """The global array per group of copies, `[group, *shape]`, of `x[*mesh, *local shape]`."""
    words, restore = as_words(x)
    rank, leading = len(at.shape), len(mesh.axes)
    order = [i for i, axis in enumerate(mesh.names) if axis not in at.sharding.axes]
    groups = mesh.devices // at.sharding.shards(mesh)
    for dim, axes in enumerate(at.sharding.dims):
        order += [*(mesh.names.index(axis) for axis in axes), leading + dim]
    order += range(leading + rank, words.ndim)
    padded = at.sharding.padded_shape(at.shape, mesh)
    whole = words.transpose(order).reshape(groups, *padded, *words.shape[leading + rank :])
    return restore(whole[(slice(None), *(slice(n) for n in at.shape))])


def _poison(dtype: np.dtype) -> np.ndarray:
    if jnp.issubdtype(dtype, jnp.inexact):
        return np.asarray(np.nan).astype(dtype)
    return np.asarray(True if dtype == np.bool_ else jnp.iinfo(dtype).max, dtype)


def on_one_device(x: Any, value: Value) -> Any:
    """The argument `x` for the input `value` of a program, as a single device takes it."""
    x = np.asarray(x) if isinstance(x, Uneven) else _typed(x, value)
    if isinstance(x, Tracer) or not isinstance(x, jax.Array) or not x.committed:
        return x
    return jax.device_put(x, jax.local_devices()[0])


@dataclasses.dataclass(frozen=True)
class Executable:
    """A local `program` on the `devices` of the user's mesh: flat arguments in, flat results out.

    `mesh` is the program's mesh: the user's, maybe with axes cut into sub-axes. The results are
    `jax.Array`s on the user's mesh, or `Uneven` where axes do not divide their dim. It compiles
    once; under `jit`, `grad` and `vmap` it becomes a part of the program being traced.
    """

    program: Program
    devices: DeviceMesh
    mesh: Mesh
    donate: tuple[bool, ...]

    def __call__(self, *args: Any) -> list[Any]:
        if any(isinstance(x, Tracer) for x in args):
            return self._trace(args)
        self._check_donated(args)
        placed = self._placed(args)
        if any(isinstance(x, Tracer) for x in placed):  # numpy arrays, in a function being traced
            return self._trace(args)
        outs = self._compiled(*placed)
        if self._gives_even:
            return list(outs)
        return [
            x if x.shape == at.shape else Uneven(x, at.shape)
            for x, at in zip(outs, self._outs, strict=True)
        ]

    def stacked(self, *args: Any) -> Sequence[jax.Array]:
        """What every device holds of each output: `out[i][*mesh, *local shape]`."""

        def held(*shards: jax.Array) -> tuple[jax.Array, ...]:
            outs = evaluate(self.program, shards, self._backend)
            one = (1,) * len(self.mesh.axes)
            return tuple(x.reshape(one + x.shape) for x in map(jnp.asarray, outs))

        run = jax.shard_map(
            held,
            mesh=self._own,
            in_specs=tuple(P(*at.sharding.dims) for at in self._ins),
            out_specs=P(*self.mesh.names),
            check_vma=False,
        )
        placed = self._placed(args)
        with jax.sharding.use_abstract_mesh(self._own.abstract_mesh):
            return jax.jit(run)(*placed)

    def lower(self) -> jax.stages.Lowered:
        """The program for XLA; `lower().as_text()` shows it."""
        run = jax.jit(
            self._sharded,
            in_shardings=self.in_shardings,
            out_shardings=self.out_shardings,
            donate_argnums=tuple(i for i, donated in enumerate(self.donate) if donated),
        )
        avals = [
            jax.ShapeDtypeStruct(at.sharding.padded_shape(at.shape, self.mesh), value.dtype)
            for value, at in zip(self.program.ins, self._ins, strict=True)
        ]
        with jax.sharding.use_abstract_mesh(self._own.abstract_mesh):
            return run.lower(*avals)

    def compile(self, compiler_options: Mapping[str, Any] | None = None) -> jax.stages.Compiled:
        """The program compiled for the devices, which need not exist in this process."""
        if not compiler_options:
            return self._compiled
        return self.lower().compile(dict(compiler_options))

    @functools.cached_property
    def in_shardings(self) -> tuple[NamedSharding, ...]:
        """Where each argument lies, on the user's mesh; dims are padded to fit."""
        return tuple(self._sharding(at) for at in self._ins)

    @functools.cached_property
    def out_shardings(self) -> tuple[NamedSharding, ...]:
        """Where each result lies, on the user's mesh; dims are padded to fit."""
        return tuple(self._sharding(at) for at in self._outs)

    @functools.cached_property
    def _compiled(self) -> jax.stages.Compiled:
        return self.lower().compile()

    @functools.cached_property
    def _ins(self) -> tuple[Layout, ...]:
        return tuple(_layout(value) for value in self.program.ins)

    @functools.cached_property
    def _outs(self) -> tuple[Layout, ...]:
        return tuple(_layout(value) for value in self.program.outs)

    @functools.cached_property
    def _backend(self) -> Backend:
        return backend_of(self.devices.devices.flat[0].platform)

    @functools.cached_property
    def _gives_even(self) -> bool:
        return all(at.sharding.padded_shape(at.shape, self.mesh) == at.shape for at in self._outs)

    @functools.cached_property
    def _own(self) -> DeviceMesh:
        """The program's mesh over the user's devices."""
        sizes = tuple(size for _, size in self.mesh.axes)
        kinds = (AxisType.Auto,) * len(sizes)
        return DeviceMesh(self.devices.devices.reshape(sizes), self.mesh.names, axis_types=kinds)

    @functools.cached_property
    def _boundary(self) -> DeviceMesh:
        """The user's mesh, as arrays outside of a `shard_map` can lie on it: nothing is Manual."""
        kinds = tuple(
            AxisType.Auto if kind == AxisType.Manual else kind for kind in self.devices.axis_types
        )
        return DeviceMesh(self.devices.devices, self.devices.axis_names, axis_types=kinds)

    def _sharding(self, at: Layout) -> NamedSharding:
        return NamedSharding(self._boundary, to_spec(at.sharding.dims, self.mesh))

    @functools.cached_property
    def _sharded(self) -> Callable[..., tuple[jax.Array, ...]]:
        def local_program(*shards: jax.Array) -> tuple[jax.Array, ...]:
            return tuple(evaluate(self.program, shards, self._backend))

        return jax.shard_map(
            local_program,
            mesh=self._own,
            in_specs=tuple(P(*at.sharding.dims) for at in self._ins),
            out_specs=tuple(P(*at.sharding.dims) for at in self._outs),
            check_vma=False,
        )

    def _trace(self, args: Sequence[Any]) -> list[jax.Array]:
        """The results as tracers: the program as a part of the one that is being traced."""
        if manual := jax.sharding.get_abstract_mesh().manual_axes:
            raise MeshError(
                f"a partitioned function is called inside shard_map over {list(manual)}, where "
                "arrays are shards; call it outside, on whole arrays."
            )
        return self._inline(*(x.padded if isinstance(x, Uneven) else x for x in args))

    @functools.cached_property
    def _inline(self) -> Callable[..., list[jax.Array]]:
        """The program on tracers of whole arrays, whatever the axis types of the mesh.

        Uneven dims are padded on the way in, and cut and gathered on the way out: no tracer can
        have an uneven sharding.
        """

        def whole(*args: jax.Array) -> list[jax.Array]:
            with jax.sharding.use_abstract_mesh(self._own.abstract_mesh):
                shapes = [at.sharding.padded_shape(at.shape, self.mesh) for at in self._ins]
                outs = self._sharded(*map(_pad, args, shapes))
                return [
                    x if x.shape == at.shape else lax.slice(x, (0,) * x.ndim, at.shape)
                    for x, at in zip(outs, self._outs, strict=True)
                ]

        even = [
            NamedSharding(self._boundary, to_spec(_even(at, self.mesh).dims, self.mesh))
            for at in self._outs
        ]
        names = self.devices.axis_names
        return jax.jit(jax.sharding.auto_axes(whole, axes=names, out_sharding=even))

    def _placed(self, args: Sequence[Any]) -> list[jax.Array]:
        """The arguments as they must lie, those that do so already as they are."""
        wanted = zip(args, self.program.ins, self._ins, self.in_shardings, strict=True)
        return [
            x
            if isinstance(x, jax.Array) and _lies(x, value, at, sharding)
            else self._place(x, value, at, sharding)
            for x, value, at, sharding in wanted
        ]

    def _place(self, x: Any, value: Value, at: Layout, sharding: NamedSharding) -> jax.Array:
        if isinstance(x, Uneven) and _lies(x, value, at, sharding):
            return x.padded
        if isinstance(x, Uneven):
            x = jnp.asarray(x)
        self._check_devices(value, x)
        shape, x = np.shape(x), _typed(x, value)
        if shape == at.shape:
            x = _pad_now(x, at.sharding.padded_shape(at.shape, self.mesh))
            x = _put(x, sharding)  # gives numpy's float64 JAX's precision
        if shape != at.shape or x.dtype != value.dtype:
            raise ArgumentError(
                f"argument {value} was planned as {show_type(at.shape, value.dtype)}, and is given "
                f"as {show_type(shape, x.dtype)}; convert it, or plan again for this type."
            )
        return x

    def _check_donated(self, args: Sequence[Any]) -> None:
        """Raises if an array is donated and passed a second time: XLA would crash."""
        if not any(self.donate) or len(set(map(id, args))) == len(args):
            return
        first: dict[int, int] = {}
        for i, x in enumerate(args):
            j = first.setdefault(id(x), i)
            if i == j or not isinstance(x, jax.Array | Uneven):
                continue
            if self.donate[i] or self.donate[j]:
                a, b = self.program.ins[j], self.program.ins[i]
                raise ArgumentError(
                    f"arguments {a} and {b} are the same array, and {a if self.donate[j] else b} "
                    "is donated; pass a copy of it (jnp.copy) for one of them."
                )

    def _check_devices(self, value: Value, x: Any) -> None:
        if not isinstance(x, jax.Array) or not x.committed:
            return
        mine = set(self.devices.devices.flat)
        if not x.sharding.device_set <= mine:
            raise MeshError(
                f"argument {value} lies on {_show_devices(x.sharding.device_set)}, but mesh "
                f"{show_mesh(self.devices.shape)} is made of {_show_devices(mine)}; move it there "
                "with jax.device_put, or pass a numpy array."
            )


def compile_program(
    program: Program, devices: DeviceMesh, mesh: Mesh, donate: Sequence[bool] = ()
) -> Executable:
    """The callable that runs the local `program` on `devices`; compiled when first called.

    `mesh` is the program's, which may cut an axis of `devices` into sub-axes. `donate[i]` gives the
    memory of argument i to the results.
    """
    return Executable(program, devices, mesh, tuple(donate))


def _lies(x: jax.Array | Uneven, value: Value, at: Layout, sharding: NamedSharding) -> bool:
    """Whether `x` can be passed for the input `value` as it is."""
    return (
        x.shape == at.shape
        and x.dtype == value.dtype
        and (x.sharding is sharding or _same(x.sharding, sharding, x.ndim))
    )


@functools.lru_cache(maxsize=4096)
def _same(a: jax.sharding.Sharding, b: NamedSharding, rank: int) -> bool:
    """Whether both put the same shards on the same devices: `P("x")` and `P("x", None)` do."""
    return a == b or a.is_equivalent_to(b, rank)


def _pad(x: Any, shape: Sequence[int]) -> Any:
    """`x` with zeros up to `shape`; numpy arrays stay on the host."""
    widths = [(0, total - n) for n, total in zip(np.shape(x), shape, strict=True)]
    if not any(pad for _, pad in widths):
        return x
    if not isinstance(x, jax.Array):
        return np.pad(x, widths)
    words, restore = as_words(x)
    widths += [(0, 0)] * (words.ndim - len(shape))
    zero = np.zeros((), words.dtype)
    return restore(lax.pad(words, zero, [(before, after, 0) for before, after in widths]))


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
    """`x` on the devices of `sharding`; where these belong to several processes, each puts its own.

    All of them pass the same `x`: `jax.device_put` would send it around to see that it is so.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    words, restore = as_words(x) if isinstance(x, jax.Array) else (x, lambda words: words)
    if isinstance(words, jax.Array) and not words.is_fully_addressable:
        return restore(jax.device_put(words, sharding))  # from device to device
    host = np.asarray(words)
    host = host.astype(jax.dtypes.canonicalize_dtype(host.dtype), copy=False)
    return restore(jax.make_array_from_callback(host.shape, sharding, lambda index: host[index]))


def _typed(x: Any, value: Value) -> Any:
    """Python's numbers as arrays of the type they were planned with."""
    return np.asarray(x, value.dtype) if isinstance(x, bool | int | float | complex) else x


def _pad_now(x: Any, shape: Sequence[int]) -> Any:
    """`_pad` of an array that is at hand, whatever mesh and trace the caller is in."""
    if tuple(shape) == np.shape(x):
        return x
    mesh = jax.sharding.AbstractMesh((), ())
    if isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding):
        plain = automatic(cast(DeviceMesh, x.sharding.mesh))
        x, mesh = on_mesh(x, plain), plain.abstract_mesh
    with jax.sharding.use_abstract_mesh(mesh), jax.ensure_compile_time_eval():
        return _pad(x, shape)


def _even(at: Layout, mesh: Mesh) -> Sharding:
    """`at.sharding` without the axes of uneven dims."""
    return Sharding(
        tuple(
            () if n % mesh.size(axes) else axes
            for n, axes in zip(at.shape, at.sharding.dims, strict=True)
        )
    )


def _show_devices(devices: set[Any]) -> str:
    names = sorted(f"{d.platform}:{d.id}" for d in devices)
    return ", ".join(names) if len(names) <= 4 else f"{len(names)} devices from {names[0]} on"
