"""Each pass: what it does to a small program, and what it may never do to any."""

import functools
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import gspmd
from gspmd import P, local, run
from gspmd.collectives import wire_bytes
from gspmd.ir import COLLECTIVES, Layout, Op, Program, Value, values_of, verify
from gspmd.optimize import Pass, optimize, passes
from gspmd.optimize.combine import SMALL, combine
from gspmd.optimize.delay import delay
from gspmd.optimize.drop_unused import drop_unused
from gspmd.optimize.hoist import hoist
from gspmd.optimize.narrow import narrow
from gspmd.optimize.scatter import scatter
from gspmd.optimize.share import share
from gspmd.optimize.transposes import fewer_transposes
from gspmd.optimize.unroll import SHORT, unroll
from gspmd.options import ROOM, TARGETS, Options
from gspmd.printing import show
from gspmd.search import search
from gspmd.sharding import Axes, Mesh, Sharding, itemsize
from gspmd.testing import DrawnProgram, programs

X4 = Mesh((("x", 4),))
TPU = TARGETS["tpu"]
PASSES = passes(Options(), TPU)
PASSES_ON_CPU = passes(Options(), TARGETS["cpu"])
F32, BF16 = np.dtype(np.float32), np.dtype(jnp.bfloat16)


combine_on_cpu = functools.partial(combine, small=SMALL["cpu"])


class Builder:
    """Writes a local program op by op."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh, self.count = mesh, 0
        self.ins: list[Value] = []
        self.ops: list[Op] = []

    def value(
        self,
        shape: tuple[int, ...],
        dims: tuple[Axes, ...],
        partial: Axes = (),
        name: str = "",
        dtype: Any = F32,
    ) -> Value:
        sharding = Sharding(dims, partial)
        local_shape = sharding.local_shape(shape, self.mesh)
        self.count += 1
        return Value(self.count, local_shape, dtype, name, Layout(shape, sharding))

    def arg(self, name: str, shape: tuple[int, ...], *dims: str, dtype: Any = F32) -> Value:
        split = tuple((axis,) if axis else () for axis in dims)
        made = self.value(shape, split, name=name, dtype=dtype)
        self.ins.append(made)
        return made

    def op(
        self, name: str, ins: Sequence[Value], like: Value, call: Any = None, **params: Any
    ) -> Value:
        self.ops.append(Op(name, tuple(ins), (like,), params, call=call))
        return like

    def done(self, *outs: Value) -> Program:
        return verify(Program(tuple(self.ins), tuple(self.ops), outs), self.mesh)


def owed_sum(b: Builder, name: str, n: int) -> Value:
    """A sum over x, still owed."""
    x = b.arg(name, (8, n), "x", "")
    return b.op(
        "reduce_sum", [x], b.value((n,), ((),), ("x",)), lambda x, axes: jnp.sum(x, axes), axes=(0,)
    )


def paid(b: Builder, x: Value) -> Value:
    n = x.shape[0]
    return b.op("all_reduce", [x], b.value((n,), ((),)), axes=("x",), reduction="sum")


def block(b: Builder, x: Value) -> Value:
    n = x.shape[0]
    params = {"axes": ("x",), "dim": 0, "size": n}
    return b.op("shard", [x], b.value((n,), (("x",),)), local.shard, **params)


def plus(b: Builder, x: Value, y: Value) -> Value:
    assert x.layout is not None
    same = b.value(x.layout.shape, x.layout.sharding.dims)
    return b.op("add", [x, y], same, lambda x, y: x + y)


def converted(b: Builder, x: Value, dtype: Any) -> Value:
    assert x.layout is not None
    like = b.value(x.layout.shape, x.layout.sharding.dims, x.layout.sharding.partial, dtype=dtype)
    convert = lambda x, new_dtype: x.astype(new_dtype)  # noqa: E731
    return b.op("convert_element_type", [x], like, convert, new_dtype=dtype)


def whole(b: Builder, x: Value) -> Value:
    assert x.layout is not None
    return b.op(
        "all_gather", [x], b.value(x.layout.shape, ((),), dtype=x.dtype), axes=("x",), dim=0
    )


def rounded_on_arrival(b: Builder) -> Program:
    return b.done(converted(b, whole(b, b.arg("w", (8,), "x")), BF16))


def widened_on_departure(b: Builder) -> Program:
    return b.done(whole(b, converted(b, b.arg("w", (8,), "x", dtype=BF16), F32)))


def rounded_and_kept(b: Builder) -> Program:
    w = whole(b, b.arg("w", (8,), "x"))
    return b.done(converted(b, w, BF16), w)


def moved_twice_and_rounded(b: Builder) -> Program:
    w = b.arg("w", (8, 8), "x", "")
    turned = b.value((8, 8), ((), ("x",)))
    params = {"axes": ("x",), "split_dim": 1, "concat_dim": 0}
    turned = b.op("all_to_all", [w], turned, **params)
    flat = b.value((64,), ((),))
    every = b.op("all_gather", [turned], b.value((8, 8), ((), ())), axes=("x",), dim=1)
    flat = b.op(
        "reshape", [every], flat, lambda x, new_sizes: x.reshape(new_sizes), new_sizes=(64,)
    )
    return b.done(converted(b, flat, BF16))


def a_sum_of_one_and_zeros(b: Builder) -> Program:
    one = b.op(
        "owner", [b.arg("w", (8,), "")], b.value((8,), ((),), ("x",)), local.owner, axes=("x",)
    )
    return b.done(converted(b, paid(b, one), BF16))


def a_sum_rounded(b: Builder) -> Program:
    return b.done(converted(b, paid(b, owed_sum(b, "x", 8)), BF16))


def a_gather_for_each_step(rows: int) -> Callable[[Builder], Program]:
    """Made before the loop, though its only use is in there."""

    def build(b: Builder) -> Program:
        weights, total = whole(b, b.arg("w", (rows,), "x")), b.arg("total", (rows,), "")
        weight, carry, grown = (b.value((rows,), ((),)) for _ in range(3))
        step = Op("add", (carry, weight), (grown,), call=lambda x, y: x + y)
        body = Program((weight, carry), (step,), (grown,))
        params = {"num_consts": 1, "num_carry": 1, "length": 3, "reverse": False, "unroll": 1}
        out = b.value((rows,), ((),))
        b.ops.append(Op("scan", (weights, total), (out,), params, bodies=(body,)))
        return b.done(out)

    return build


def tanh(b: Builder, x: Value) -> Value:
    assert x.layout is not None
    return b.op("tanh", [x], b.value(x.layout.shape, x.layout.sharding.dims), jnp.tanh)


def total(b: Builder, x: Value) -> Value:
    """What no elementwise op reads."""
    return b.op("reduce_sum", [x], b.value((), ()), lambda x, axes: jnp.sum(x, axes), axes=(0,))


def added_once_gathered(n: int) -> Callable[[Builder], Program]:
    def build(b: Builder) -> Program:
        x, y, z = b.arg("x", (n,), "x"), b.arg("y", (n,), "x"), b.arg("z", (n,), "")
        return b.done(total(b, plus(b, plus(b, whole(b, x), z), tanh(b, whole(b, y)))))

    return build


def gathered_and_kept(b: Builder) -> Program:
    x, y = whole(b, b.arg("x", (8,), "x")), whole(b, b.arg("y", (8,), "x"))
    return b.done(plus(b, x, y), x)


def one_gather(b: Builder) -> Program:
    return b.done(total(b, tanh(b, whole(b, b.arg("x", (8,), "x")))))


def sums_added_after_tanh(n: int) -> Callable[[Builder], Program]:
    return lambda b: b.done(plus(b, *(tanh(b, paid(b, owed_sum(b, name, n))) for name in "xy")))


def a_sum_cut_after_tanh(b: Builder) -> Program:
    return b.done(block(b, tanh(b, paid(b, owed_sum(b, "x", 32)))))


def gathers_cut_after_plus(b: Builder) -> Program:
    x, y = whole(b, b.arg("x", (8,), "x")), whole(b, b.arg("y", (8,), "x"))
    return b.done(block(b, plus(b, x, y)))


def gathered_twice(b: Builder) -> Program:
    w = b.arg("w", (8,), "x")
    both = [b.op("all_gather", [w], b.value((8,), ((),)), axes=("x",), dim=0) for _ in range(2)]
    return b.done(plus(b, *both))


def half_unused(b: Builder) -> Program:
    x = b.arg("x", (8,), "x")
    same = (("x",),)
    kept = b.op("tanh", [x], b.value((8,), same), jnp.tanh)
    b.op("neg", [b.op("all_gather", [x], b.value((8,), ((),)), axes=("x",), dim=0)],
         b.value((8,), ((),)), jnp.negative)  # fmt: skip
    return b.done(kept)


def reduced_then_cut(n: int) -> Callable[[Builder], Program]:
    return lambda b: b.done(block(b, paid(b, owed_sum(b, "x", n))))


def reduced_cut_and_kept(b: Builder) -> Program:
    whole = paid(b, owed_sum(b, "x", 8))
    return b.done(block(b, whole), whole)


def two_small_sums(b: Builder) -> Program:
    first = paid(b, owed_sum(b, "x", 4))
    second = paid(b, owed_sum(b, "y", 4))
    return b.done(plus(b, first, second))


def two_small_gathers(b: Builder) -> Program:
    """Along different dims; the second is used after the first."""
    w, v = b.arg("w", (8, 2), "x", ""), b.arg("v", (8, 8), "", "x")
    first = b.op("all_gather", [w], b.value((8, 2), ((), ())), axes=("x",), dim=0)
    early = b.op("tanh", [first], b.value((8, 2), ((), ())), jnp.tanh)
    second = b.op("all_gather", [v], b.value((8, 8), ((), ())), axes=("x",), dim=1)
    return b.done(early, second)


def two_small_scatters(b: Builder) -> Program:
    def scattered(name: str) -> Value:
        params = {"axes": ("x",), "dim": 0, "reduction": "sum"}
        return b.op("reduce_scatter", [owed_sum(b, name, 8)], b.value((8,), (("x",),)), **params)

    return b.done(plus(b, scattered("x"), scattered("y")))


def a_sum_transposed_first(b: Builder) -> Program:
    x = b.arg("x", (8, 2, 3), "x", "", "")
    owed = b.op("reduce_sum", [x], b.value((2, 3), ((), ()), ("x",)), jnp.sum, axis=0)
    turned = b.op("transpose", [owed], b.value((3, 2), ((), ()), ("x",)), lax.transpose,
                  permutation=(1, 0))  # fmt: skip
    whole = b.value((3, 2), ((), ()))
    return b.done(b.op("all_reduce", [turned], whole, axes=("x",), reduction="sum"))


def a_product_transposed(b: Builder) -> Program:
    x, w = b.arg("x", (2, 8, 3), "", "x", ""), b.arg("w", (2, 3, 4), "", "", "")
    made = b.op(
        "dot_general", [x, w], b.value((2, 8, 4), ((), ("x",), ())), lax.dot_general,
        dimension_numbers=(((2,), (1,)), ((0,), (0,))), precision=None,
        preferred_element_type=None,
    )  # fmt: skip
    return b.done(
        b.op("transpose", [made], b.value((2, 4, 8), ((), (), ("x",))), lax.transpose,
             permutation=(0, 2, 1))
    )  # fmt: skip


def dims_of_size_one_moved(b: Builder) -> Program:
    x = b.arg("x", (3, 4, 5), "", "x", "")
    return b.done(
        b.op("transpose", [x], b.value((4, 3, 5), (("x",), (), ())), lax.transpose,
             permutation=(1, 0, 2))
    )  # fmt: skip


def loops_in_a_loop(*lengths: int) -> Callable[[Builder], Program]:
    """Each after the other."""

    def loop(x: Value, out: Value, length: int, body: Program) -> Op:
        params = {"num_consts": 0, "num_carry": 1, "length": length, "reverse": False, "unroll": 1}
        return Op("scan", (x,), (out,), params, bodies=(body,))

    def build(b: Builder) -> Program:
        fresh = lambda: b.value((8,), (("x",),))  # noqa: E731
        ops: list[Op] = []
        carry = x = fresh()
        for length in lengths:
            old, new, out = fresh(), fresh(), fresh()
            step = Op("add", (old, old), (new,), call=lambda x, y: x + y)
            ops.append(loop(x, out, length, Program((old,), (step,), (new,))))
            x = out
        given, out = b.arg("x", (8,), "x"), fresh()
        b.ops.append(loop(given, out, 2, Program((carry,), tuple(ops), (x,))))
        return b.done(out)

    return build


def a_sum_used_early(b: Builder) -> Program:
    x, y = owed_sum(b, "x", 4), owed_sum(b, "y", 4)
    early = b.op("tanh", [paid(b, x)], b.value((4,), ((),)), jnp.tanh)
    return b.done(plus(b, early, paid(b, y)))


def one_sum_of_another(b: Builder) -> Program:
    first = paid(b, owed_sum(b, "x", 4))
    again = b.op("mul", [first, first], b.value((4,), ((),), ("x",)), lambda x, y: x * y)
    return b.done(paid(b, again))


def a_gather_in_each_step(length: int, rows: int = 8) -> Callable[[Builder], Program]:
    def build(b: Builder) -> Program:
        w, total = b.arg("w", (rows,), "x"), b.arg("total", (rows,), "")
        weight, carry = b.value((rows,), (("x",),)), b.value((rows,), ((),))
        whole = b.value((rows,), ((),))
        step = [Op("all_gather", (weight,), (whole,), {"axes": ("x",), "dim": 0})]
        grown = b.value((rows,), ((),))
        step.append(Op("add", (carry, whole), (grown,), call=lambda x, y: x + y))
        body = Program((weight, carry), tuple(step), (grown,))
        out = b.value((rows,), ((),))
        params = {"num_consts": 1, "num_carry": 1, "length": length, "reverse": False, "unroll": 1}
        b.ops.append(Op("scan", (w, total), (out,), params, bodies=(body,)))
        return b.done(out)

    return build


CASES: dict[str, tuple[Pass, Callable[[Builder], Program], str]] = {
    "hoist sends before a loop what stays the same in it": (hoist, a_gather_in_each_step(3), """
        program (w: f32[8@x], total: f32[8])
          #1 %0: f32[8] = all_gather[x][dim=0] w
          %1: f32[8] = scan[length=3] w, %0, total
            body (%2: f32[8@x], %3: f32[8], %4: f32[8])
              %5: f32[8] = add %4, %3
              return %5
          return %1
        """),
    "hoist leaves a single step alone": (hoist, a_gather_in_each_step(1), """
        program (w: f32[8@x], total: f32[8])
          %0: f32[8] = scan[length=1] w, total
            body (%1: f32[8@x], %2: f32[8])
              #1 %3: f32[8] = all_gather[x][dim=0] %1
              %4: f32[8] = add %2, %3
              return %4
          return %0
        """),
    "hoist leaves before a loop what fits in the room": (
        functools.partial(hoist, room=24), a_gather_for_each_step(8), """
        program (w: f32[8@x], total: f32[8])
          #1 %0: f32[8] = all_gather[x][dim=0] w
          %1: f32[8] = scan[length=3] %0, total
            body (%2: f32[8], %3: f32[8])
              %4: f32[8] = add %3, %2
              return %4
          return %1
        """),
    "narrow rounds before it sends": (narrow, rounded_on_arrival, """
        program (w: f32[8@x])
          %0: bf16[8@x] = convert_element_type[new_dtype=bf16] w
          #1 %1: bf16[8] = all_gather[x][dim=0] %0
          return %1
        """),
    "narrow widens after it sent": (narrow, widened_on_departure, """
        program (w: bf16[8@x])
          %0: f32[8@x] = convert_element_type[new_dtype=f32] w
          #1 %1: bf16[8] = all_gather[x][dim=0] w
          %2: f32[8] = convert_element_type[new_dtype=f32] %1
          return %2
        """),
    "narrow leaves what is read in full": (narrow, rounded_and_kept, """
        program (w: f32[8@x])
          #1 %0: f32[8] = all_gather[x][dim=0] w
          %1: bf16[8] = convert_element_type[new_dtype=bf16] %0
          return %1, %0
        """),
    "narrow looks through what only moves": (narrow, moved_twice_and_rounded, """
        program (w: f32[8@x,8])
          %0: bf16[8@x,8] = convert_element_type[new_dtype=bf16] w
          #1 %1: bf16[8,8@x] = all_to_all[x][split_dim=1 concat_dim=0] %0
          #2 %2: bf16[8,8] = all_gather[x][dim=1] %1
          %3: bf16[64] = reshape %2
          return %3
        """),
    "narrow sends a sum to which one device adds": (narrow, a_sum_of_one_and_zeros, """
        program (w: f32[8])
          %0: f32[8]+x = owner[axes=x] w
          %1: bf16[8]+x = convert_element_type[new_dtype=bf16] %0
          #1 %2: bf16[8] = all_reduce[x] %1
          return %2
        """),
    "narrow leaves other sums as written": (narrow, a_sum_rounded, """
        program (x: f32[8@x,8])
          %0: f32[8]+x = reduce_sum[axes=(0,)] x
          #1 %1: f32[8] = all_reduce[x] %0
          %2: bf16[8] = convert_element_type[new_dtype=bf16] %1
          return %2
        """),
    "narrow rounds other sums on demand": (
        functools.partial(narrow, sums=True), a_sum_rounded, """
        program (x: f32[8@x,8])
          %0: f32[8]+x = reduce_sum[axes=(0,)] x
          %1: bf16[8]+x = convert_element_type[new_dtype=bf16] %0
          #1 %2: bf16[8] = all_reduce[x] %1
          return %2
        """),
    "share merges two gathers of one value": (share, gathered_twice, """
        program (w: f32[8@x])
          #1 %0: f32[8] = all_gather[x][dim=0] w
          %1: f32[8] = add %0, %0
          return %1
        """),
    "delay gathers a sum, not its summands": (delay, added_once_gathered(8), """
        program (x: f32[8@x], y: f32[8@x], z: f32[8])
          %0: f32[8@x] = shard[axes=x dim=0] z
          %1: f32[8@x] = add x, %0
          %2: f32[8@x] = tanh y
          %3: f32[8@x] = add %1, %2
          #1 %4: f32[8] = all_gather[x][dim=0] %3
          %5: f32[] = reduce_sum[axes=(0,)] %4
          return %5
        """),
    "delay leaves what is read in other places, too": (delay, gathered_and_kept, """
        program (x: f32[8@x], y: f32[8@x])
          #1 %0: f32[8] = all_gather[x][dim=0] x
          #2 %1: f32[8] = all_gather[x][dim=0] y
          %2: f32[8] = add %0, %1
          return %2, %0
        """),
    "delay leaves a gather that is as large before as after": (delay, one_gather, """
        program (x: f32[8@x])
          #1 %0: f32[8] = all_gather[x][dim=0] x
          %1: f32[8] = tanh %0
          %2: f32[] = reduce_sum[axes=(0,)] %1
          return %2
        """),
    "delay gathers once what sums lead to": (delay, sums_added_after_tanh(32), """
        program (x: f32[8@x,32], y: f32[8@x,32])
          %0: f32[32]+x = reduce_sum[axes=(0,)] x
          #1 %1: f32[32@x] = reduce_scatter[x][dim=0] %0
          %2: f32[32@x] = tanh %1
          %3: f32[32]+x = reduce_sum[axes=(0,)] y
          #2 %4: f32[32@x] = reduce_scatter[x][dim=0] %3
          %5: f32[32@x] = tanh %4
          %6: f32[32@x] = add %2, %5
          #3 %7: f32[32] = all_gather[x][dim=0] %6
          return %7
        """),
    "delay drops the half of a sum that is cut in the end": (delay, a_sum_cut_after_tanh, """
        program (x: f32[8@x,32])
          %0: f32[32]+x = reduce_sum[axes=(0,)] x
          #1 %1: f32[32@x] = reduce_scatter[x][dim=0] %0
          %2: f32[32@x] = tanh %1
          return %2
        """),
    "delay scatters no sum into thin shards": (delay, sums_added_after_tanh(28), """
        program (x: f32[8@x,28], y: f32[8@x,28])
          %0: f32[28]+x = reduce_sum[axes=(0,)] x
          #1 %1: f32[28] = all_reduce[x] %0
          %2: f32[28] = tanh %1
          %3: f32[28]+x = reduce_sum[axes=(0,)] y
          #2 %4: f32[28] = all_reduce[x] %3
          %5: f32[28] = tanh %4
          %6: f32[28] = add %2, %5
          return %6
        """),
    "delay drops gathers that are cut in the end": (delay, gathers_cut_after_plus, """
        program (x: f32[8@x], y: f32[8@x])
          %0: f32[8@x] = add x, y
          return %0
        """),
    "drop_unused removes what nobody reads": (drop_unused, half_unused, """
        program (x: f32[8@x])
          %0: f32[8@x] = tanh x
          return %0
        """),
    "scatter fuses a sum with the cut of its only use": (scatter, reduced_then_cut(8), """
        program (x: f32[8@x,8])
          %0: f32[8]+x = reduce_sum[axes=(0,)] x
          #1 %1: f32[8@x] = reduce_scatter[x][dim=0] %0
          return %1
        """),
    "scatter leaves uneven blocks alone": (scatter, reduced_then_cut(6), """
        program (x: f32[8@x,6])
          %0: f32[6]+x = reduce_sum[axes=(0,)] x
          #1 %1: f32[6] = all_reduce[x] %0
          %2: f32[6@x] = shard[axes=x dim=0] %1
          return %2
        """),
    "scatter leaves a sum that is used whole": (scatter, reduced_cut_and_kept, """
        program (x: f32[8@x,8])
          %0: f32[8]+x = reduce_sum[axes=(0,)] x
          #1 %1: f32[8] = all_reduce[x] %0
          %2: f32[8@x] = shard[axes=x dim=0] %1
          return %2, %1
        """),
    "combine sends small sums together": (combine, two_small_sums, """
        program (x: f32[8@x,4], y: f32[8@x,4])
          %0: f32[4]+x = reduce_sum[axes=(0,)] x
          %1: f32[4]+x = reduce_sum[axes=(0,)] y
          #1 %2: f32[4], %3: f32[4] = all_reduce[x] %0, %1
          %4: f32[4] = add %2, %3
          return %4
        """),
    "combine sends a sum ahead of its use": (combine, a_sum_used_early, """
        program (x: f32[8@x,4], y: f32[8@x,4])
          %0: f32[4]+x = reduce_sum[axes=(0,)] x
          %1: f32[4]+x = reduce_sum[axes=(0,)] y
          #1 %2: f32[4], %3: f32[4] = all_reduce[x] %0, %1
          %4: f32[4] = tanh %2
          %5: f32[4] = add %4, %3
          return %5
        """),
    "combine leaves gathers apart where nothing makes one of them": (
        combine, two_small_gathers, """
        program (w: f32[8@x,2], v: f32[8,8@x])
          #1 %0: f32[8,2] = all_gather[x][dim=0] w
          %1: f32[8,2] = tanh %0
          #2 %2: f32[8,8] = all_gather[x][dim=1] v
          return %1, %2
        """),
    "combine sends small gathers together on CPU": (combine_on_cpu, two_small_gathers, """
        program (w: f32[8@x,2], v: f32[8,8@x])
          #1 %0: f32[8,2], %1: f32[8,8] = all_gather[x][dim=(0,1)] w, v
          %2: f32[8,2] = tanh %0
          return %2, %1
        """),
    "combine sends small scatters together on CPU": (combine_on_cpu, two_small_scatters, """
        program (x: f32[8@x,8], y: f32[8@x,8])
          %0: f32[8]+x = reduce_sum[axes=(0,)] x
          %1: f32[8]+x = reduce_sum[axes=(0,)] y
          #1 %2: f32[8@x], %3: f32[8@x] = reduce_scatter[x][dim=(0,0)] %0, %1
          %4: f32[8@x] = add %2, %3
          return %4
        """),
    "fewer_transposes reduces what comes out of a product": (
        fewer_transposes, a_sum_transposed_first, """
        program (x: f32[8@x,2,3])
          %0: f32[2,3]+x = reduce_sum[axis=0] x
          #1 %1: f32[2,3] = all_reduce[x] %0
          %2: f32[3,2] = transpose[permutation=(1,0)] %1
          return %2
        """),
    "fewer_transposes swaps the operands of a product": (
        fewer_transposes, a_product_transposed, """
        program (x: f32[2,8@x,3], w: f32[2,3,4])
          %0: f32[2,4,8@x] = dot_general w, x
          return %0
        """),
    "fewer_transposes moves nothing where dims have size one": (
        fewer_transposes, dims_of_size_one_moved, """
        program (x: f32[3,4@x,5])
          %0: f32[4@x,3,5] = reshape x
          return %0
        """),
    "unroll marks the short loops in a loop": (unroll, loops_in_a_loop(1, SHORT, SHORT + 1), """
        program (x: f32[8@x])
          %0: f32[8@x] = scan[length=2] x
            body (%1: f32[8@x])
              %2: f32[8@x] = scan[length=1] %1
                body (%3: f32[8@x])
                  %4: f32[8@x] = add %3, %3
                  return %4
              %5: f32[8@x] = scan[length=4 unroll=4] %2
                body (%6: f32[8@x])
                  %7: f32[8@x] = add %6, %6
                  return %7
              %8: f32[8@x] = scan[length=5] %5
                body (%9: f32[8@x])
                  %10: f32[8@x] = add %9, %9
                  return %10
              return %8
          return %0
        """),
    "combine keeps a sum behind the sum that it needs": (combine, one_sum_of_another, """
        program (x: f32[8@x,4])
          %0: f32[4]+x = reduce_sum[axes=(0,)] x
          #1 %1: f32[4] = all_reduce[x] %0
          %2: f32[4]+x = mul %1, %1
          #2 %3: f32[4] = all_reduce[x] %2
          return %3
        """),
}  # fmt: skip


def total_wire_bytes(program: Program, mesh: Mesh) -> float:
    total = 0.0
    for op, trips in program.walk():
        if op.name in COLLECTIVES:
            axes = op.params["axes"] if "axes" in op.params else op.params["src"]
            operand = sum(np.prod(x.shape) * itemsize(x.dtype) for x in op.ins)
            total += wire_bytes(op.name, mesh.size(axes), operand) * abs(trips)
    return total


def keeps_its_promises(apply: Pass, program: Program, mesh: Mesh) -> Program:
    """`apply(program)`, which must be valid, no dearer, and the same when applied again."""
    after = verify(apply(program, mesh), mesh)
    assert total_wire_bytes(after, mesh) <= total_wire_bytes(program, mesh) + 1e-6
    assert show(apply(after, mesh)) == show(after)
    return after


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_golden(case: tuple[Pass, Callable[[Builder], Program], str]) -> None:
    apply, build, expected = case
    before = build(Builder(X4))
    after = keeps_its_promises(apply, before, X4)
    assert show(after) == textwrap.dedent(expected).strip()
    args = [
        np.arange(np.prod(x.layout.shape)).astype(x.dtype).reshape(x.layout.shape)
        for x in before.ins
        if x.layout is not None
    ]
    for got, want in zip(
        run.replicas(after, X4, args), run.replicas(before, X4, args), strict=True
    ):
        np.testing.assert_array_equal(got, want)


def test_a_transpose_that_others_read_stays() -> None:
    b = Builder(X4)
    before = a_sum_transposed_first(b)
    (turned,) = before.ops[1].outs
    owed = b.op("neg", [turned], b.value((3, 2), ((), ()), ("x",)), lax.neg)
    both = b.done(*values_of(before.outs), owed)
    assert show(fewer_transposes(both, X4)) == show(both)


@pytest.mark.parametrize(
    ("target", "order"),
    [("cpu", ["dot_general", "all_reduce"]), ("tpu", ["transpose", "all_reduce"])],
)
def test_gradients_on_cpu_are_products_that_need_no_transpose(
    target: Any, order: list[str]
) -> None:
    loss = lambda w, x: jnp.sum(jnp.tanh(x @ w))  # noqa: E731
    specs, options = (P(), P("x")), Options(target=target)
    draw = np.random.default_rng(0).normal
    args = draw(size=(16, 8)).astype("f"), draw(size=(64, 16)).astype("f")
    plan = gspmd.plan(
        jax.grad(loss), *args, mesh="x=4", in_specs=specs, out_specs=P(), options=options
    )
    assert [op.name for op in plan.program.ops[-2:]] == order
    np.testing.assert_allclose(plan.simulate(*args), jax.grad(loss)(*args), rtol=1e-4, atol=1e-5)
    assert plan.wire_bytes == 2 * 3 / 4 * 16 * 8 * 4


def test_large_sums_travel_alone() -> None:
    def two(b: Builder) -> Program:
        n = SMALL["tpu"]["all_reduce"] // 4 + 1
        first, second = (paid(b, owed_sum(b, name, n)) for name in "xy")
        return b.done(plus(b, first, second))

    before = two(Builder(X4))
    assert show(combine(before, X4)) == show(before)


def test_small_collectives_of_a_plan_travel_together_on_cpu() -> None:
    def fn(x: Any, w: Any) -> Any:
        for name in ("a", "b", "c"):
            x = jnp.tanh(x @ w[name])
        return x @ w["large"]

    w = {name: np.ones((64, 64), "f") for name in "abc"} | {"large": np.ones((64, 512), "f")}

    def kinds(target: Any) -> list[tuple[str, float]]:
        plan = gspmd.plan(
            fn, np.ones((4096, 64), "f"), w, mesh="x=4", in_specs=P("x"),
            out_specs=P("x"), options=Options(target=target),
        )  # fmt: skip
        return [(c.kind, c.wire_bytes) for c in plan.collectives]

    small, large = 64 * 64 * 3, 64 * 512 * 3  # three quarters of 4 bytes an entry
    assert kinds("cpu") == [("all_gather", 3 * small), ("all_gather", large)]
    assert kinds("tpu") == [("all_gather", small)] * 3 + [("all_gather", large)]


def test_what_a_loop_has_no_room_for_stays_inside() -> None:
    rows = ROOM // 3 // 4 * 4 + 4  # three quarters arrive
    before = a_gather_in_each_step(3, rows)(Builder(X4))
    assert show(hoist(before, X4)) == show(before)
    smaller = a_gather_in_each_step(3, rows - 8)(Builder(X4))
    assert total_wire_bytes(hoist(smaller, X4), X4) == total_wire_bytes(smaller, X4) / 3


def test_what_a_given_room_does_not_hold_enters_the_loop() -> None:
    before = a_gather_for_each_step(8)(Builder(X4))
    after = hoist(before, X4, room=23)  # 32 bytes arrive where 8 were
    assert total_wire_bytes(after, X4) == 3 * total_wire_bytes(before, X4)
    assert show(verify(after, X4)) == show(a_gather_in_each_step(3)(Builder(X4)))
    assert show(hoist(after, X4, room=23)) == show(after)
    assert show(hoist(after, X4, room=24)) != show(after)
    args = [np.arange(8, dtype=F32), np.ones(8, F32)]
    (got,), (want,) = (run.simulate(p, X4, args) for p in (after, before))
    np.testing.assert_array_equal(got, want)


def test_one_room_is_for_all_copies_of_a_loop() -> None:
    def fn(w: Any, v: Any, xs: Any) -> Any:
        def step(total: Any, x: Any) -> Any:
            return total + jnp.sum(
                jnp.tanh(x @ gspmd.annotate(w, P())) @ gspmd.annotate(v, P())
            ), None

        return lax.scan(step, jnp.float32(0), xs)[0]

    shapes = ((64, 64), (64, 64), (5, 4096, 64))
    args = [np.ones(shape, "f") for shape in shapes]

    def kinds(room: int | None) -> list[tuple[str, int]]:
        specs = (P("x"), P("x"), P(None, "x"))
        options = gspmd.Options(room=room)
        made = gspmd.plan(fn, *args, mesh="x=4", in_specs=specs, options=options)
        return sorted((c.kind, c.trips) for c in made.collectives if c.kind == "all_gather")

    copy = 64 * 64 * 4 * 3 // 4  # what each of the two adds to a device
    assert kinds(None) == kinds(2 * copy) == [("all_gather", 1)] * 2
    assert kinds(2 * copy - 1) == [("all_gather", 1), ("all_gather", 5)]
    assert kinds(copy - 1) == kinds(0) == [("all_gather", 5)] * 2


MOVES = {
    "gather": ((8, 8), P("x"), P()),
    "uneven gather": ((5, 6), P("x"), P()),
    "another dim": ((8, 8), P("x", None), P(None, "x")),
    "another uneven dim": ((6, 5), P("x", None), P(None, "x")),
    "another order": ((8, 8), P(("x", "y")), P(("y", "x"))),
    "two dims at once": ((8, 8), P("x", "y"), P("y", "x")),
    "other blocks": ((12, 4), P("x"), P("y")),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("late", [False, True])
def test_conversions_halve_what_is_sent(move: tuple[tuple[int, ...], P, P], late: bool) -> None:
    shape, src, dst = move

    def fn(x: Any) -> Any:
        first, second = (F32, BF16) if late else (BF16, F32)
        there = gspmd.annotate(x.astype(first), src)
        return gspmd.annotate(there, dst).astype(second)

    x = np.random.default_rng(0).normal(size=shape).astype(F32 if late else BF16)
    specs: dict[str, Any] = {"mesh": "x=4,y=2", "in_specs": (src,), "out_specs": dst}
    made = gspmd.plan(fn, x, **specs)
    plain = gspmd.plan(lambda x: x, x.astype(BF16), **specs)
    assert made.wire_bytes == plain.wire_bytes > 0
    np.testing.assert_array_equal(made.simulate(x), x.astype(BF16).astype(made.simulate(x).dtype))


@pytest.mark.parametrize("mode", ["clip", "fill"])
def test_a_look_up_in_a_split_table_is_summed_narrow(mode: str) -> None:
    def fn(table: Any, ids: Any) -> Any:
        return jnp.take(table, ids, axis=0, mode=mode).astype(BF16)

    rng = np.random.default_rng(0)
    table, ids = rng.normal(size=(240, 6)).astype("f"), rng.integers(0, 240, (4, 5))
    made = gspmd.plan(fn, table, ids, mesh="x=4", in_specs=(P("x"), P()), out_specs=P())
    rows = 4 * 5 * 6 * 2
    assert [(c.kind, c.wire_bytes) for c in made.collectives] == [("all_reduce", 2 * 3 / 4 * rows)]
    np.testing.assert_array_equal(made.simulate(table, ids), fn(table, ids))


def test_sums_are_narrow_on_demand() -> None:
    def fn(x: Any, w: Any) -> Any:
        return jnp.dot(x, w, preferred_element_type=F32).astype(BF16)

    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=s).astype(BF16) for s in ((6, 64), (64, 6)))

    def made(options: Options) -> gspmd.Plan:
        specs = (P(None, "x"), P("x"))
        return gspmd.plan(fn, x, w, mesh="x=4", in_specs=specs, out_specs=P(), options=options)

    written, narrowed = made(Options()), made(Options(reduction="narrow"))
    assert written.wire_bytes == 2 * narrowed.wire_bytes == 2 * 3 / 4 * 36 * 4
    np.testing.assert_array_equal(written.simulate(x, w), fn(x, w))
    np.testing.assert_allclose(  # three sums, each rounded to 8 bits
        np.float32(narrowed.simulate(x, w)), np.float32(fn(x, w)), atol=4 * 2**-8 * 24
    )


def test_gathers_of_padded_blocks_are_not_delayed() -> None:
    before = added_once_gathered(6)(Builder(X4))
    assert show(delay(before, X4)) == show(before)


def test_annotations_do_not_make_a_sum_be_gathered_twice() -> None:
    def fn(x: Any, y: Any) -> Any:
        x, y = (gspmd.annotate(v, P()) for v in (x, y))
        return gspmd.annotate(jnp.maximum(x, 2 * y) > 0, P())

    x, y = np.arange(32, dtype="f").reshape(8, 4), np.ones((8, 4), "f")
    made = gspmd.plan(fn, x, y, mesh="x=4", in_specs=(P("x"), P("x")))
    assert [(c.kind, c.wire_bytes) for c in made.collectives] == [("all_gather", 3 / 4 * 32)]
    np.testing.assert_array_equal(made.simulate(x, y), fn(x, y))


def test_passes_reach_into_bodies() -> None:
    def fn(x: Any) -> Any:
        def body(total: Any, xs: Any) -> Any:
            first, second = jnp.sum(xs, axis=0), jnp.sum(xs**2, axis=0)
            return total + jnp.tanh(first) + jnp.tanh(second), None

        return lax.scan(body, jnp.zeros(3), x)[0]

    plan = gspmd.plan(fn, np.ones((5, 8, 3), "f"), mesh="x=4", in_specs=(P(None, "x"),))
    assert [(c.kind, c.trips) for c in plan.collectives] == [("all_reduce", 5)]


def unoptimized(program: DrawnProgram) -> tuple[gspmd.Plan, Program]:
    plan = gspmd.plan(
        program,
        *program.args,
        mesh=program.mesh,
        in_specs=program.in_specs,
        out_specs=program.out_specs,
        effort=0,
    )
    return plan, search(plan.model, plan.propagated.shardings, plan.mesh, TPU, effort=0).program


@hypothesis.given(programs())
@hypothesis.settings(max_examples=25)
def test_promises_on_drawn_programs(program: DrawnProgram) -> None:
    plan, raw = unoptimized(program)
    for apply in (*PASSES, *PASSES_ON_CPU, functools.partial(narrow, sums=True)):
        keeps_its_promises(apply, raw, plan.mesh)
    done = optimize(raw, plan.mesh, PASSES)
    assert show(done) == show(plan.program)
    assert show(optimize(done, plan.mesh, PASSES)) == show(done)


@hypothesis.given(programs(steps=5))
@hypothesis.settings(max_examples=6)
def test_values_are_kept_on_drawn_programs(program: DrawnProgram) -> None:
    plan, raw = unoptimized(program)
    before = run.simulate(raw, plan.mesh, program.args)
    after = run.simulate(plan.program, plan.mesh, program.args)
    for got, want in zip(after, before, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
