"""Program -> callable: evaluate it op by op, on a simulated mesh or on a mesh of devices.

`evaluate` is the interpreter, for global and local programs alike; it runs under tracing only, so
that its own speed shows in compile time and never in a step. `simulate` gives the mesh axes their
names by nested `jax.vmap`, on one device and for any mesh; `gspmd.execute` by `jax.shard_map`.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gspmd.collectives import Target, is_collective, lower
from gspmd.ir import Layout, Literal, Op, Operand, Program
from gspmd.local import as_words
from gspmd.sharding import Mesh, Sharding
from gspmd.uneven import Uneven


def evaluate(program: Program, args: Sequence[Any], target: Target) -> list[Any]:
    """The outputs of `program` on `args`. A local program must run where its axes have names."""
    values: dict[int, Any] = {v.id: x for v, x in zip(program.ins, args, strict=True)}
    values.update((v.id, x) for v, x in program.consts)

    def read(operand: Operand) -> Any:
        if isinstance(operand, Literal):
            return np.asarray(operand.value, operand.dtype)
        return values[operand.id]

    for op in program.ops:
        results = _execute(op, [read(x) for x in op.ins], target)
        values.update((v.id, x) for v, x in zip(op.outs, results, strict=True))
    return [read(x) for x in program.outs]


def _execute(op: Op, args: list[Any], target: Target) -> Sequence[Any]:
    if op.bodies:
        return _CONTROL[op.name](op, args, target)
    if is_collective(op.name):
        return lower(op, args, target)
    assert op.call is not None, f"nothing executes {op.name}"
    results = op.call(*args, **op.params)
    return results if isinstance(results, list | tuple) else (results,)


def _scan(op: Op, args: list[Any], target: Target) -> Sequence[Any]:
    (body,) = op.bodies
    split = op.params["num_consts"], op.params["num_consts"] + op.params["num_carry"]
    consts, carry, xs = args[: split[0]], args[split[0] : split[1]], args[split[1] :]

    def step(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        outs = evaluate(body, [*consts, *carry, *xs], target)
        return outs[: len(carry)], outs[len(carry) :]

    how = {key: op.params[key] for key in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(step, carry, xs, **how)
    return [*carry, *ys]


def _while(op: Op, args: list[Any], target: Target) -> Sequence[Any]:
    condition, body = op.bodies
    split = op.params["cond_nconsts"], op.params["cond_nconsts"] + op.params["body_nconsts"]
    of_condition, of_body, carry = args[: split[0]], args[split[0] : split[1]], args[split[1] :]
    return lax.while_loop(
        lambda carry: evaluate(condition, [*of_condition, *carry], target)[0],
        lambda carry: evaluate(body, [*of_body, *carry], target),
        carry,
    )


def _cond(op: Op, args: list[Any], target: Target) -> Sequence[Any]:
    index, *operands = args
    branches = [functools.partial(_branch, body, target) for body in op.bodies]
    return lax.switch(index, branches, *operands)


def _branch(body: Program, target: Target, *operands: Any) -> list[Any]:
    return evaluate(body, operands, target)


def _remat(op: Op, args: list[Any], target: Target) -> Sequence[Any]:
    (body,) = op.bodies
    prevent_cse = op.params.get("prevent_cse", True)
    kept = prevent_cse if isinstance(prevent_cse, tuple) else (prevent_cse,) * len(args)
    if op.params.get("differentiated", False) and any(kept):
        # The backward pass computes `body` a second time; XLA must not merge that with the first.
        barred = iter(lax.optimization_barrier(list(itertools.compress(args, kept))))
        args = [next(barred) if keep else x for x, keep in zip(args, kept, strict=True)]
    run = jax.checkpoint(
        lambda *xs: evaluate(body, xs, target),
        prevent_cse=any(kept),
        policy=op.params.get("policy"),
    )
    return run(*args)


_CONTROL: dict[str, Callable[[Op, list[Any], Target], Sequence[Any]]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "remat": _remat,
}


def simulate(program: Program, mesh: Mesh, args: Sequence[Any]) -> list[jax.Array]:
    """The global outputs of a local `program` on global `args`, computed on one device."""
    return simulator(program, mesh)(*args)


def simulator(program: Program, mesh: Mesh) -> Callable[..., list[jax.Array]]:
    """A callable like the unpartitioned function, that runs every device of `mesh` on one device.

    Each mesh axis is a `jax.vmap`, so that the number of devices is bounded by memory alone.
    """
    run = jax.jit(lambda *args: [copies[0] for copies in _copies(program, mesh, args)])
    return lambda *args: run(*(_on_one_device(x) for x in args))


def replicas(
    program: Program, mesh: Mesh, args: Sequence[Any], poison: bool = False
) -> list[jax.Array]:
    """Like `simulate`, with every device's opinion: `out[i]` is the output as group i holds it.

    The devices that hold the same shards must agree on all of them. With `poison`, the padding of
    uneven inputs holds NaN, or the largest number, in place of zeros: no output may show it.
    """
    run = jax.jit(lambda *args: _copies(program, mesh, args, poison))
    return run(*(_on_one_device(x) for x in args))


def _copies(
    program: Program, mesh: Mesh, args: Sequence[Any], poison: bool = False
) -> list[jax.Array]:
    layouts = [_layout(value) for value in program.ins]
    split = [_split(x, at, mesh, poison) for x, at in zip(args, layouts, strict=True)]
    run: Callable[..., Any] = lambda *xs: tuple(evaluate(program, xs, "simulated"))  # noqa: E731
    for axis, size in reversed(mesh.axes):
        in_axes = tuple(0 if axis in at.sharding.axes else None for at in layouts)
        run = jax.vmap(run, in_axes, 0, axis_name=axis, axis_size=size)
    return [
        _join(x, _layout(out), mesh) for x, out in zip(run(*split), program.outs, strict=True)
    ]


def _layout(operand: Operand) -> Layout:
    """How `operand` lies on the mesh; what says nothing of it is whole on every device."""
    if isinstance(operand, Literal) or operand.layout is None:
        return Layout(operand.shape, Sharding.replicated(len(operand.shape)))
    assert not operand.layout.sharding.partial, f"{operand.type} crosses the program's boundary"
    return operand.layout


def _split(x: Any, at: Layout, mesh: Mesh, poison: bool) -> jax.Array:
    """The shards of global `x`: one leading dim for each mesh axis that splits it, in mesh order."""
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


def _join(x: jax.Array, at: Layout, mesh: Mesh) -> jax.Array:
    """Undoes `_split` on `x[each mesh axis, *local shape]`: one global array per group of copies."""
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


def _on_one_device(x: Any) -> Any:
    if isinstance(x, Uneven):
        return np.asarray(x)
    if isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array) or x.sharding.num_devices == 1:
        return x
    return jax.device_put(x, min(x.sharding.addressable_devices, key=lambda device: device.id))
