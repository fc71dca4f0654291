"""evaluate: runs a program op by op, on arrays or under tracing.

One interpreter for global and local programs alike. What runs it decides where the mesh axes get
their names from; here they are only passed on, as the `backend` of the collectives.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from gspmd.collectives import Backend, is_collective, lower
from gspmd.ir import Literal, Op, Operand, Program


def evaluate(program: Program, args: Sequence[Any], backend: Backend) -> list[Any]:
    """The outputs of `program` on `args`. A local program must run where its axes have names."""
    values: dict[int, Any] = {v.id: x for v, x in zip(program.ins, args, strict=True)}
    values.update((v.id, x) for v, x in program.consts)

    def read(operand: Operand) -> Any:
        if isinstance(operand, Literal):
            return np.asarray(operand.value, operand.dtype)
        return values[operand.id]

    for op in program.ops:
        results = _execute(op, [read(x) for x in op.ins], backend)
        values.update((v.id, x) for v, x in zip(op.outs, results, strict=True))
    return [read(x) for x in program.outs]


def _execute(op: Op, args: list[Any], backend: Backend) -> Sequence[Any]:
    if op.bodies:
        return _CONTROL[op.name](op, args, backend)
    if is_collective(op.name):
        return lower(op, args, backend)
    assert op.call is not None, f"nothing executes {op.name}"
    results = op.call(*args, **op.params)
    return results if isinstance(results, list | tuple) else (results,)


def _scan(op: Op, args: list[Any], backend: Backend) -> Sequence[Any]:
    (body,) = op.bodies
    split = op.params["num_consts"], op.params["num_consts"] + op.params["num_carry"]
    consts, carry, xs = args[: split[0]], args[split[0] : split[1]], args[split[1] :]

    def step(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        outs = evaluate(body, [*consts, *carry, *xs], backend)
        return outs[: len(carry)], outs[len(carry) :]

    how = {key: op.params[key] for key in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(step, carry, xs, **how)
    return [*carry, *ys]


def _while(op: Op, args: list[Any], backend: Backend) -> Sequence[Any]:
    condition, body = op.bodies
    split = op.params["cond_nconsts"], op.params["cond_nconsts"] + op.params["body_nconsts"]
    of_condition, of_body, carry = args[: split[0]], args[split[0] : split[1]], args[split[1] :]
    return lax.while_loop(
        lambda carry: evaluate(condition, [*of_condition, *carry], backend)[0],
        lambda carry: evaluate(body, [*of_body, *carry], backend),
        carry,
    )


def _cond(op: Op, args: list[Any], backend: Backend) -> Sequence[Any]:
    index, *operands = args
    branches = [functools.partial(_branch, body, backend) for body in op.bodies]
    return lax.switch(index, branches, *operands)


def _branch(body: Program, backend: Backend, *operands: Any) -> list[Any]:
    return evaluate(body, operands, backend)


def _remat(op: Op, args: list[Any], backend: Backend) -> Sequence[Any]:
    (body,) = op.bodies
    prevent_cse = op.params.get("prevent_cse", True)
    kept = prevent_cse if isinstance(prevent_cse, tuple) else (prevent_cse,) * len(args)
    if op.params.get("differentiated", False) and any(kept):
        # The backward pass computes `body` a second time; XLA must not merge that with the first.
        barred = iter(lax.optimization_barrier(list(itertools.compress(args, kept))))
        args = [next(barred) if keep else x for x, keep in zip(args, kept, strict=True)]
    run = jax.checkpoint(
        lambda *xs: evaluate(body, xs, backend),
        prevent_cse=any(kept),
        policy=op.params.get("policy"),
    )
    return run(*args)


def _shard_map(op: Op, args: list[Any], backend: Backend) -> Sequence[Any]:
    (body,) = op.bodies  # every device is in it already
    return evaluate(body, args, backend)


_CONTROL: dict[str, Callable[[Op, list[Any], Backend], Sequence[Any]]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "remat": _remat,
    "shard_map": _shard_map,
}
