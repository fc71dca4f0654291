"""Transposes that XLA on CPU would pay for are not there, or come where they cost less.

The gradient of a weight is a product that JAX transposes. Folded into the product, that has a form
for which XLA on CPU has no fast routine; folded into an update of a slice, as in a loop over
layers, it jumps through memory: five times the time of the product itself. But the product of the
operands in the other order needs no transpose:

%0 = dot_general ct, x
%1 = transpose[permutation=(1,0)] %0          ->    %1 = dot_general x, ct

Other sums are reduced first, so that what comes out of a product stays as it is:

%1 = transpose[permutation=(1,0)] %0          #1 %1 = all_reduce[x] %0
#1 %2 = all_reduce[x] %1                ->    %2 = transpose[permutation=(1,0)] %1

And what only moves dims of size one, as where a device has one stage of a pipeline, moves nothing:
XLA would copy it all the same.

%1: f32[8,4@x,6] = transpose[permutation=(1,0,2)] %0    ->    %1 = reshape %0
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

from jax import lax

from gspmd.ir import Layout, Op, Program, Value, next_id, values_of
from gspmd.sharding import Mesh, Sharding


def fewer_transposes(program: Program, mesh: Mesh) -> Program:
    """Swaps the operands of a product instead of transposing it, and reduces sums before that."""
    return _moved(program, itertools.count(next_id(program)))


def _moved(program: Program, ids: Iterator[int]) -> Program:
    uses: collections.Counter[Value] = collections.Counter(values_of(program.outs))
    for op in program.ops:
        uses.update(values_of(op.ins))
    alone: dict[Value, Op] = {}  # products and transposes with one use
    ops: dict[Op, None] = {}  # in order
    for op in program.ops:
        if op.bodies:
            op = dataclasses.replace(op, bodies=tuple(_moved(body, ids) for body in op.bodies))
        before = alone.get(values_of(op.ins)[0]) if len(values_of(op.ins)) == 1 else None
        if before is not None and op.name == "transpose" and before.name == "dot_general":
            swapped = _product(before, op)
            if swapped is not None:
                del ops[before]
                op = swapped
        elif before is not None and op.name == "all_reduce" and before.name == "transpose":
            del ops[before]
            op, after = _swapped(before, op, next(ids))
            ops[op] = None
            op = after
        if op.name == "transpose" and _moves_nothing(op):
            op = _reshape(op)
        if op.name in ("dot_general", "transpose") and uses[op.outs[0]] == 1:
            alone[op.outs[0]] = op
        ops[op] = None
    return dataclasses.replace(program, ops=tuple(ops))


def _product(product: Op, transpose: Op) -> Op | None:
    """What `transpose` makes of `product` as one of the operands in the other order, if it is."""
    (lhs_in, rhs_in), (lhs_batch, rhs_batch) = product.params["dimension_numbers"]
    order: tuple[int, ...] = transpose.params["permutation"]
    batch, lhs = len(lhs_batch), len(product.ins[0].shape) - len(lhs_batch) - len(lhs_in)
    rest = range(batch, len(order))
    if order[batch:] != (*rest[lhs:], *rest[:lhs]):
        return None
    turned = [tuple(dims[i] for i in order[:batch]) for dims in (rhs_batch, lhs_batch)]
    params: dict[str, Any] = {
        **product.params, "dimension_numbers": ((rhs_in, lhs_in), tuple(turned))
    }  # fmt: skip
    if isinstance(params["precision"], tuple):
        params["precision"] = params["precision"][::-1]
    return dataclasses.replace(
        product, ins=product.ins[::-1], outs=transpose.outs, params=MappingProxyType(params)
    )


def _moves_nothing(transpose: Op) -> bool:
    """Whether the dims that have more than one entry stay in their order."""
    shape = transpose.ins[0].shape
    moved = [dim for dim in transpose.params["permutation"] if shape[dim] != 1]
    return moved == sorted(moved)


def _reshape(transpose: Op) -> Op:
    params = {"new_sizes": transpose.outs[0].shape, "dimensions": None}
    return dataclasses.replace(
        transpose, name="reshape", params=MappingProxyType(params), call=lax.reshape
    )


def _swapped(transpose: Op, reduction: Op, number: int) -> tuple[Op, Op]:
    """`reduction` of what `transpose` reads, and then the transpose."""
    (out,) = reduction.outs
    order: tuple[int, ...] = transpose.params["permutation"]
    back = [order.index(dim) for dim in range(len(order))]
    layout = out.layout
    if layout is not None:
        dims = tuple(layout.sharding.dims[dim] for dim in back)
        shape = tuple(layout.shape[dim] for dim in back)
        layout = Layout(shape, Sharding(dims, layout.sharding.partial))
    value = Value(number, tuple(out.shape[dim] for dim in back), out.dtype, layout=layout)
    reduced = dataclasses.replace(reduction, ins=transpose.ins, outs=(value,))
    return reduced, dataclasses.replace(transpose, ins=(value,), outs=(out,))
