"""Each pass: what it does to a small program, and what it may never do to any."""

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import gspmd
from gspmd import P, local, run
from gspmd.collectives import wire_bytes
from gspmd.ir import COLLECTIVES, Layout, Op, Program, Value, verify
from gspmd.optimize import Pass, optimize, passes
from gspmd.optimize.combine import SMALL, combine
from gspmd.optimize.drop_unused import drop_unused
from gspmd.optimize.hoist import ROOM, hoist
from gspmd.optimize.scatter import scatter
from gspmd.optimize.share import share
from gspmd.options import TARGETS, Options
from gspmd.partition import partition
from gspmd.printing import show
from gspmd.sharding import Axes, Mesh, Sharding, itemsize
from gspmd.testing import DrawnProgram, programs

X4 = Mesh((("x", 4),))
TPU = TARGETS["tpu"]
PASSES = passes(Options(), TPU)
F32 = np.dtype(np.float32)


class Builder:
    """Writes a local program op by op."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh, self.count = mesh, 0
        self.ins: list[Value] = []
        self.ops: list[Op] = []

    def value(
        self, shape: tuple[int, ...], dims: tuple[Axes, ...], partial: Axes = (), name: str = ""
    ) -> Value:
        sharding = Sharding(dims, partial)
        local_shape = sharding.local_shape(shape, self.mesh)
        self.count += 1
        return Value(self.count, local_shape, F32, name, Layout(shape, sharding))

    def arg(self, name: str, shape: tuple[int, ...], *dims: str) -> Value:
        made = self.value(shape, tuple((axis,) if axis else () for axis in dims), name=name)
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
    "share merges two gathers of one value": (share, gathered_twice, """
        program (w: f32[8@x])
          #1 %0: f32[8] = all_gather[x][dim=0] w
          %1: f32[8] = add %0, %0
          return %1
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
        np.arange(np.prod(x.layout.shape), dtype=F32).reshape(x.layout.shape)
        for x in before.ins
        if x.layout is not None
    ]
    for got, want in zip(
        run.replicas(after, X4, args), run.replicas(before, X4, args), strict=True
    ):
        np.testing.assert_array_equal(got, want)


def test_large_sums_travel_alone() -> None:
    def two(b: Builder) -> Program:
        n = SMALL // 4 + 1
        first, second = (paid(b, owed_sum(b, name, n)) for name in "xy")
        return b.done(plus(b, first, second))

    before = two(Builder(X4))
    assert show(combine(before, X4)) == show(before)


def test_what_a_loop_has_no_room_for_stays_inside() -> None:
    rows = ROOM // 3 // 4 * 4 + 4  # three quarters arrive
    before = a_gather_in_each_step(3, rows)(Builder(X4))
    assert show(hoist(before, X4)) == show(before)
    smaller = a_gather_in_each_step(3, rows - 8)(Builder(X4))
    assert total_wire_bytes(hoist(smaller, X4), X4) == total_wire_bytes(smaller, X4) / 3


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
    )
    return plan, partition(plan.model, plan.propagated.shardings, plan.mesh, TPU).program


@hypothesis.given(programs())
@hypothesis.settings(max_examples=25)
def test_promises_on_drawn_programs(program: DrawnProgram) -> None:
    plan, raw = unoptimized(program)
    for apply in PASSES:
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
