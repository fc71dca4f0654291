"""Loops that send while they compute: the same values, the same bytes, and in which steps."""

import functools
import math
import textwrap
from collections import Counter
from collections.abc import Callable
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax import lax

import gspmd
from gspmd import P, run
from gspmd.collectives import wire_bytes
from gspmd.ir import COLLECTIVES, Op, Program, bytes_of, verify
from gspmd.optimize.matmul import loop_products
from gspmd.optimize.prefetch import prefetch
from gspmd.optimize.ring import UNROLLED, Ring
from gspmd.optimize.timing import product_seconds, saved
from gspmd.options import TARGETS, Options, Target
from gspmd.printing import show
from gspmd.sharding import Mesh

TPU, GPU, CPU = (TARGETS[name] for name in ("tpu", "gpu", "cpu"))
EITHER = pytest.mark.parametrize("target", [TPU, GPU], ids=["both ways", "one way"])

Apply = Callable[[Program, Mesh], Program]


def draw(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(dtype)


def sent(program: Program, mesh: Mesh) -> float:
    """Bytes that a device sends."""
    return sum(
        wire_bytes(op.name, mesh.size(op.params.get("axes", ("x", "y"))), bytes_of(op.ins)) * trips
        for op, trips in program.walk()
        if op.name in COLLECTIVES
    )


def kinds(program: Program) -> dict[str, int]:
    """How often collectives of each kind run."""
    found: Counter[str] = Counter()
    for op, trips in program.walk():
        if op.name in COLLECTIVES:
            found[op.name] += trips
    return dict(found)


def overlapped(apply: Apply, plan: gspmd.Plan, *args: Any, rtol: float = 1e-5) -> Program:
    """`apply(plan.program)`: valid, the same values on every device, the same bytes, idempotent."""
    after = verify(apply(plan.program, plan.mesh), plan.mesh)
    assert sent(after, plan.mesh) == sent(plan.program, plan.mesh)
    assert show(apply(after, plan.mesh)) == show(after)
    flat = jax.tree.leaves(args)
    before = run.replicas(plan.program, plan.mesh, flat, poison=True)
    for got, want in zip(run.replicas(after, plan.mesh, flat, poison=True), before, strict=True):
        scale = np.abs(np.asarray(want, np.float64)).max(initial=1e-30)
        got, want = (np.asarray(x, np.float64) / scale for x in (got, want))
        np.testing.assert_allclose(got, want, rtol=0, atol=rtol)
    return after


def looped(target: Target, always: bool = True) -> Apply:
    return functools.partial(loop_products, target=target, always=always)


def ahead(target: Target, always: bool = True, room: float = math.inf) -> Apply:
    return functools.partial(prefetch, target=target, always=always, room=room)


def multiply(x: Any, w: Any) -> Any:
    return x @ w


def gathered(n: int, rows: int, target: Target) -> tuple[gspmd.Plan, Program]:
    """Rows that are gathered for a product with split columns, and the same as a ring."""
    args = draw(rows, 6), draw(6, 2 * n)
    specs: dict[str, Any] = {"in_specs": (P("x", None), P(None, "x")), "out_specs": P(None, "x")}
    plan = gspmd.plan(multiply, *args, mesh={"x": n}, **specs)
    assert kinds(plan.program) == {"all_gather": 1}
    return plan, overlapped(looped(target), plan, *args)


def summed(n: int, inner: int, target: Target) -> tuple[gspmd.Plan, Program]:
    """A summed dim that is gathered for a product with split columns, and the same as a ring."""
    args = draw(3, inner), draw(inner, 2 * n)
    specs: dict[str, Any] = {"in_specs": (P(None, "x"), P(None, "x")), "out_specs": P(None, "x")}
    plan = gspmd.plan(multiply, *args, mesh={"x": n}, **specs)
    return plan, overlapped(looped(target), plan, *args)


def scattered(n: int, rows: int, target: Target) -> tuple[gspmd.Plan, Program]:
    """A product over a split dim whose sum is scattered, and the same as a ring."""
    args = draw(rows, 2 * n), draw(2 * n, 5)
    specs: dict[str, Any] = {"in_specs": (P(None, "x"), P("x", None)), "out_specs": P("x", None)}
    plan = gspmd.plan(multiply, *args, mesh={"x": n}, **specs)
    return plan, overlapped(looped(target), plan, *args)


@EITHER
@pytest.mark.parametrize("n", [2, 3, 4, 8, 9, 12])
@pytest.mark.parametrize("build", [gathered, summed, scattered])
def test_a_ring_sends_what_the_collective_sent(build: Any, n: int, target: Target) -> None:
    for size in (2 * n, 2 * n - 1):  # the last shard full, and not
        plan, after = build(n, size, target)
        (before,) = kinds(plan.program)
        assert before in ("all_gather", "reduce_scatter")
        assert kinds(after) == {"collective_permute": n - 1}


@pytest.mark.parametrize("n", [2, 3, 8, 9, 1000])
def test_both_ways_takes_half_the_steps(n: int) -> None:
    assert Ring(("x",), n, 1).steps == n - 1
    assert Ring(("x",), n, 2).steps == n // 2


def test_many_devices_are_a_loop() -> None:
    assert UNROLLED == 8
    sizes = set()
    for n in (9, 12, 64, 1024):
        args = jax.ShapeDtypeStruct((n, 8), "f"), jax.ShapeDtypeStruct((8, n), "f")
        plan = gspmd.plan(multiply, *args, mesh={"x": n}, in_specs=(P("x"), P(None, "x")))
        after = loop_products(plan.program, plan.mesh, TPU, always=True)
        assert kinds(after) == {"collective_permute": n - 1}
        sizes.add((n % 2, len(list(after.walk()))))
    assert len(sizes) == 2  # those of an even and of an odd number of devices


GOLDENS: dict[str, tuple[Any, str]] = {
    "rows are gathered, and their products put in place": (
        gathered,
        """
        program (x: f32[8@x,6], w: f32[6,8@x])
          %0: f32[8,2] = room
          %1: i32[] = ahead[axes=x] 0:i32
          #1 %2: f32[2,6] = collective_permute[x][pairs=-1mod4] x
          #2 %3: f32[2,6] = collective_permute[x][pairs=+1mod4] x
          %4: f32[2,2] = dot_general x, w
          %5: f32[8,2] = put_block[dim=0] %0, %4, %1
          #3 %6: f32[2,6] = collective_permute[x][pairs=-1mod4] %2
          %7: i32[] = ahead[axes=x] 1:i32
          %8: f32[2,2] = dot_general %2, w
          %9: f32[8,2] = put_block[dim=0] %5, %8, %7
          %10: i32[] = behind[axes=x] 1:i32
          %11: f32[2,2] = dot_general %3, w
          %12: f32[8,2] = put_block[dim=0] %9, %11, %10
          %13: i32[] = ahead[axes=x] 2:i32
          %14: f32[2,2] = dot_general %6, w
          %15: f32[8,8@x] = put_block[dim=0] %12, %14, %13
          return %15
        """,
    ),
    "products are made for one device after another": (
        scattered,
        """
        program (x: f32[8,8@x], w: f32[8@x,5])
          %0: i32[] = ahead[axes=x] 2:i32
          %1: f32[2,2] = take_block[dim=0] x, %0
          %2: f32[2,5] = dot_general %1, w
          #1 %3: f32[2,5] = collective_permute[x][pairs=+1mod4] %2
          %4: i32[] = ahead[axes=x] 1:i32
          %5: f32[2,2] = take_block[dim=0] x, %4
          %6: f32[2,5] = dot_general %5, w
          %7: f32[2,5] = apart %6
          %8: f32[2,5] = add %3, %7
          %9: i32[] = behind[axes=x] 1:i32
          %10: f32[2,2] = take_block[dim=0] x, %9
          %11: f32[2,5] = dot_general %10, w
          #2 %12: f32[2,5] = collective_permute[x][pairs=+1mod4] %8
          #3 %13: f32[2,5] = collective_permute[x][pairs=-1mod4] %11
          %14: i32[] = ahead[axes=x] 0:i32
          %15: f32[2,2] = take_block[dim=0] x, %14
          %16: f32[2,5] = dot_general %15, w
          %17: f32[2,5] = apart %16
          %18: f32[2,5] = add %12, %17
          %19: f32[8@x,5] = add %13, %18
          return %19
        """,
    ),
}


def without_sources(program: Program) -> str:
    lines = show(program).splitlines()
    return "\n".join(line.partition("  # ")[0].rstrip() for line in lines)


@pytest.mark.parametrize("case", GOLDENS.values(), ids=GOLDENS)
def test_golden(case: tuple[Any, str]) -> None:
    build, expected = case
    _, after = build(4, 8, TPU)
    assert without_sources(after) == textwrap.dedent(expected).strip()


@EITHER
def test_a_batch_dim(target: Target) -> None:
    args = draw(6, 4, 5), draw(6, 5, 64)
    plan = gspmd.plan(
        lambda x, w: jnp.einsum("bij,bjk->bik", x, w), *args, mesh="x=4",
        in_specs=(P("x"), P()), out_specs=P(),
    )  # fmt: skip
    after = overlapped(looped(target), plan, *args)
    assert kinds(after) == kinds(plan.program)  # the result is what is gathered
    plan = gspmd.plan(
        lambda x, w: jnp.einsum("bij,bjk->bik", x, w), *args, mesh="x=4",
        in_specs=(P("x"), P(None, None, "x")), out_specs=P(None, None, "x"),
    )  # fmt: skip
    assert kinds(overlapped(looped(target), plan, *args)) == {"collective_permute": 3}


@EITHER
def test_several_axes(target: Target) -> None:
    args = draw(13, 6), draw(6, 4)
    plan = gspmd.plan(
        multiply, *args, mesh="x=2,y=2,z=2",
        in_specs=(P(("x", "y"), None), P(None, "z")), out_specs=P(None, "z"),
    )  # fmt: skip
    after = overlapped(looped(target), plan, *args)
    assert "collective_permute" not in kinds(plan.program)
    assert sent(after, plan.mesh) == sent(plan.program, plan.mesh)


@EITHER
def test_products_of_one_gather_share_its_ring(target: Target) -> None:
    """Also where one product needs another, which comes after the ring."""

    def fn(x: Any, q: Any, k: Any, v: Any) -> Any:
        a, b = x @ q, jnp.tanh(x @ k)
        return a * b, (x @ v) + a, (b.T @ x).T, x

    args = draw(7, 6), draw(6, 8), draw(6, 8), draw(6, 8)
    cut = P(None, "x")
    plan = gspmd.plan(
        fn, *args, mesh="x=4", in_specs=(P("x", None), cut, cut, cut),
        out_specs=(cut, cut, P(None, "x"), P("x")),
    )  # fmt: skip
    assert kinds(plan.program) == {"all_gather": 1}
    assert kinds(overlapped(looped(target), plan, *args)) == {"collective_permute": 3}


@EITHER
def test_a_sum_of_products_is_scattered_by_one_ring(target: Target) -> None:
    def fn(x: Any, u: Any, y: Any, w: Any, z: Any) -> Any:
        return x @ u + y @ w + z

    args = draw(7, 8), draw(8, 5), draw(7, 4), draw(4, 5), draw(7, 5)
    plan = gspmd.plan(
        fn, *args, mesh="x=4",
        in_specs=(P(None, "x"), P("x"), P(None, "x"), P("x"), P("x")), out_specs=P("x"),
    )  # fmt: skip
    assert kinds(plan.program) == {"reduce_scatter": 1}
    assert kinds(overlapped(looped(target), plan, *args)) == {"collective_permute": 3}


@EITHER
def test_a_chain_in_a_scan(target: Target) -> None:
    """Rows are gathered, multiplied twice and scattered, in each step and in its gradient."""

    def fn(x: Any, up: Any, down: Any) -> Any:
        def step(x: Any, w: Any) -> Any:
            up, down = w
            y = gspmd.annotate(jnp.tanh(gspmd.annotate(x, P("x", None)) @ up) @ down, P("x", None))
            return y, None

        return jnp.sum(lax.scan(step, x, (up, down))[0] ** 2)

    args = draw(8, 6), 0.3 * draw(3, 6, 8), 0.3 * draw(3, 8, 6)
    specs = P("x", None), P(None, None, "x"), P(None, "x", None)
    plan = gspmd.plan(
        jax.value_and_grad(fn, argnums=(0, 1, 2)), *args, mesh="x=4", in_specs=specs,
        out_specs=(P(), specs),
    )  # fmt: skip
    before = kinds(plan.program)
    after = kinds(overlapped(looped(target), plan, *args))
    rest = {"all_gather", "reduce_scatter"} & set(after)
    assert before["all_gather"] >= 3
    assert before["reduce_scatter"] >= 3
    assert not rest
    assert after["collective_permute"] == 3 * (before["all_gather"] + before["reduce_scatter"])


@pytest.mark.parametrize("build", [gathered, summed, scattered])
def test_narrow_sums_are_as_precise_as_one_product(build: Any) -> None:
    n, inner = 8, 512
    columns = 16 if build is scattered else 2048  # the rows are the smaller operand, or the result
    args = draw(16, inner, dtype=jnp.bfloat16), draw(inner, columns, dtype=jnp.bfloat16)
    specs: dict[Any, Any] = {
        gathered: ((P("x", None), P(None, "x")), P(None, "x")),
        summed: ((P(None, "x"), P(None, "x")), P(None, "x")),
        scattered: ((P(None, "x"), P("x", None)), P("x", None)),
    }
    in_specs, out_specs = specs[build]
    plan = gspmd.plan(multiply, *args, mesh={"x": n}, in_specs=in_specs, out_specs=out_specs)
    after = overlapped(looped(TPU), plan, *args, rtol=2e-2)
    assert kinds(after) == {"collective_permute": n - 1}
    right = args[0].astype(np.float64) @ args[1].astype(np.float64)
    off = [
        np.abs(np.asarray(run.simulate(p, plan.mesh, args)[0], np.float64) - right).max()
        for p in (after, plan.program)
    ]
    assert off[0] <= 1.25 * off[1]


@st.composite
def products(data: st.DrawFn) -> tuple[str, list[tuple[int, ...]], list[P], P, str]:
    """An einsum of two operands with 1 to 2 dims each of batch, rows, columns and summands."""
    letters = iter("abcdefghijkl")
    kinds = {
        kind: [next(letters) for _ in range(data(st.integers(low, 2 if low else 1)))]
        for kind, low in (("batch", 0), ("rows", 1), ("columns", 1), ("inner", 1))
    }
    size = {x: data(st.integers(1, 6)) for xs in kinds.values() for x in xs}

    def permuted(*names: str) -> list[str]:
        return data(st.permutations([letter for name in names for letter in kinds[name]]))

    tensors = [
        permuted("batch", "rows", "inner"),
        permuted("batch", "inner", "columns"),
        permuted("batch", "rows", "columns"),
    ]
    specs: list[P] = []
    for dims in tensors:
        axes = data(st.permutations(["x", "y", *[None] * len(dims)]))
        specs.append(P(*axes[: len(dims)]))
    text = "{},{}->{}".format(*map("".join, tensors))
    shapes = [tuple(size[x] for x in dims) for dims in tensors[:2]]
    mesh = data(st.sampled_from(["x=2,y=2", "x=3,y=2", "x=4,y=1", "x=2,y=4"]))
    return text, shapes, specs[:2], specs[2], mesh


@hypothesis.given(products(), st.sampled_from([TPU, GPU]))
@hypothesis.settings(max_examples=20)
def test_drawn_products(case: Any, target: Target) -> None:
    text, shapes, in_specs, out_specs, mesh = case
    args = [draw(*shape) for shape in shapes]
    plan = gspmd.plan(
        functools.partial(jnp.einsum, text), *args, mesh=mesh, in_specs=tuple(in_specs),
        out_specs=out_specs,
    )  # fmt: skip
    overlapped(looped(target), plan, *args)


# ------------------------------------------------------------------------------------- when


def big(rows: int, inner: int, columns: int, mesh: dict[str, int]) -> gspmd.Plan:
    """A product whose rows are gathered over x; its columns are split over x and y."""
    args = (
        jax.ShapeDtypeStruct((rows, inner), jnp.bfloat16),
        jax.ShapeDtypeStruct((inner, columns), jnp.bfloat16),
    )
    specs: dict[str, Any] = {"in_specs": (P("x", None), P(None, "x")), "out_specs": P(None, "x")}
    return gspmd.plan(multiply, *args, mesh=mesh, **specs)


@pytest.mark.parametrize(
    ("target", "rows", "taken"),
    [
        (TPU, 1 << 15, True),
        (TPU, 64, False),  # pieces of 16 rows take as long as 128
        (GPU, 1 << 15, True),
        (CPU, 1 << 15, False),  # who computes cannot send
    ],
)
def test_auto_takes_what_pays(target: Target, rows: int, taken: bool) -> None:
    plan = big(rows, 8192, 32768, {"x": 4})
    after = loop_products(plan.program, plan.mesh, target, always=False)
    assert kinds(after) == ({"collective_permute": 3} if taken else {"all_gather": 1})


def test_auto_leaves_what_is_used_otherwise_too() -> None:
    """A ring would put it together piece by piece, for which compilers take twice the memory."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    cut = P(None, "x")
    plan = gspmd.plan(
        lambda x, w: (x @ w, gspmd.annotate(jnp.tanh(gspmd.annotate(x, P())), P())),
        shape((1 << 15, 8192)), shape((8192, 32768)),
        mesh="x=4", in_specs=(P("x", None), cut), out_specs=(cut, P()),
    )  # fmt: skip
    for always in (False, True):
        after = loop_products(plan.program, plan.mesh, TPU, always=always)
        assert ("all_gather" in kinds(after)) is not always


def test_the_price_of_a_ring() -> None:
    plan = big(1 << 15, 8192, 32768, {"x": 4})
    dot = next(op for op, _ in plan.program.walk() if op.name == "dot_general")
    whole, piece = product_seconds(dot, TPU), product_seconds(dot, TPU, 0, 1 << 13)
    assert whole == 2 * 2**15 * 8192 * 8192 / TPU.flops
    assert piece == whole / 4
    block = 2.0 * 8192 * 8192
    ring = Ring(("x",), 4, 2)
    sending = 3 * block / (2 * TPU.link)
    assert saved(whole, piece, block, ring, TPU) == pytest.approx(sending - piece)
    assert saved(whole, whole, block, ring, TPU) < 0


def test_a_product_of_few_rows_takes_a_tile() -> None:
    plan = big(1 << 15, 8192, 32768, {"x": 4})
    dot = next(op for op, _ in plan.program.walk() if op.name == "dot_general")
    assert product_seconds(dot, TPU, 0, 1) >= 2 * 128 * 8192 * 8192 / TPU.flops


# --------------------------------------------------------------------------------- prefetch


def layers(remat: bool, carried: bool = True) -> Callable[..., Any]:
    """The gradient of a scan over layers whose weights are gathered in each step."""

    def loss(x: Any, up: Any, down: Any) -> Any:
        def step(x: Any, w: Any) -> Any:
            up, down = w
            y = gspmd.annotate(jnp.tanh(x @ up) @ down, P("x", None))
            return y, jnp.sum(y, axis=1)

        y, sums = lax.scan(jax.checkpoint(step) if remat else step, x, (up, down))
        return jnp.sum(y**2) + jnp.sum(sums**3)

    return loss


ARGS = draw(8, 6), 0.3 * draw(4, 6, 7), 0.3 * draw(4, 7, 6)
FSDP = P("x", None), P(None, "x", None), P(None, None, "x")


@pytest.mark.parametrize("remat", [False, True])
def test_the_next_weights_are_gathered_first(remat: bool) -> None:
    grad = jax.value_and_grad(layers(remat), argnums=(0, 1, 2))
    plan = gspmd.plan(grad, *ARGS, mesh="x=4", in_specs=FSDP, out_specs=(P(), FSDP))
    before = kinds(plan.program)
    after = overlapped(ahead(TPU), plan, *ARGS)
    assert kinds(after) == before
    loops = [op for op, _ in after.walk() if op.name == "scan"]
    assert [op.params["length"] for op in loops] == [3, 3]
    found = [_early_gathers(*loop.bodies) for loop in loops]
    assert [len(gathers) for gathers in found] == ([2, 2] if remat else [2, 1])
    both = overlapped(lambda p, mesh: looped(TPU)(ahead(TPU)(p, mesh), mesh), plan, *ARGS)
    assert "reduce_scatter" not in kinds(both)


def test_prefetch_golden() -> None:
    def fn(x: Any, w: Any) -> Any:
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    args = draw(8, 6), draw(5, 6, 6)
    plan = gspmd.plan(fn, *args, mesh="x=2", in_specs=(P("x", None), P(None, "x", None)))
    after = overlapped(ahead(TPU), plan, *args)
    assert (
        without_sources(after)
        == textwrap.dedent("""
        program (x: f32[8@x,6], w: f32[5,6@x,6])
          %0: f32[6@x,6] = take_step w, 0:i32
          #1 %1: f32[6,6] = all_gather[x][dim=0] %0
          %2: i32[4] = steps[length=4]
          %3: f32[8@x,6], %4: f32[6,6] = scan[length=4] w, x, %1, %2
            body (%5: f32[5,6@x,6], %6: f32[8@x,6], %7: f32[6,6], %8: i32[])
              %9: i32[] = add %8, 1:i32
              %10: f32[6@x,6] = take_step %5, %9
              #2 %11: f32[6,6] = all_gather[x][dim=0] %10
              %12: f32[8@x,6] = dot_general %6, %7
              %13: f32[8@x,6] = tanh %12
              return %13, %11
          %14: f32[8@x,6] = dot_general %3, %4
          %15: f32[8@x,6] = tanh %14
          return %15
        """).strip()
    )


def _early_gathers(body: Program) -> list[Op]:
    """The gathers for the next step: nothing in this one waits for them."""
    used = {x for op in body.ops for x in op.ins}
    return [
        op for op in body.ops
        if op.name == "all_gather" and op.outs[0] in body.outs and op.outs[0] not in used
    ]  # fmt: skip


def test_a_loop_of_constants_and_carries_stays() -> None:
    def fn(x: Any, w: Any) -> Any:
        return lax.scan(lambda x, _: (gspmd.annotate(x @ w, P("x", None)), None), x, length=3)[0]

    args = draw(8, 8), 0.3 * draw(8, 8)
    plan = gspmd.plan(fn, *args, mesh="x=4", in_specs=(P("x", None), P()))
    assert show(ahead(TPU)(plan.program, plan.mesh)) == show(plan.program)


def test_prefetch_where_it_hides_something() -> None:
    def fn(x: Any, w: Any) -> Any:
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    def lengths(rows: int, target: Target) -> list[int]:
        shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
        args = shape((rows, 8192)), shape((4, 8192, 8192))
        plan = gspmd.plan(fn, *args, mesh="x=4", in_specs=(P("x"), P(None, "x")))
        after = ahead(target, always=False)(plan.program, plan.mesh)
        return [op.params["length"] for op, _ in after.walk() if op.name == "scan"]

    assert lengths(1 << 14, TPU) == [3]
    assert lengths(1 << 14, CPU) == [4]


def test_prefetch_where_there_is_room() -> None:
    plan = gspmd.plan(layers(False), *ARGS, mesh="x=4", in_specs=FSDP)
    taken = 4 * (8 * 7 + 7 * 8)  # what arrives of both weights
    for room, length in ((taken, 3), (taken - 1, 4)):
        after = ahead(TPU, room=room)(plan.program, plan.mesh)
        assert [op.params["length"] for op, _ in after.walk() if op.name == "scan"] == [length]


# --------------------------------------------------------------------------------- together


@pytest.mark.parametrize("platform", ["tpu", "gpu", "cpu"])
def test_on_devices(platform: Any) -> None:
    """The option reaches the passes, and what comes out runs on devices as it is simulated."""
    grad = jax.value_and_grad(layers(True), argnums=(0, 1, 2))
    how: dict[str, Any] = {"mesh": "x=2,y=4", "in_specs": (P("y", None), *FSDP[1:])}
    options = Options(overlap="always", target=platform)
    plan = gspmd.plan(grad, *ARGS, **how, options=options)
    plain = gspmd.plan(grad, *ARGS, **how, options=Options(target=platform))
    assert plan.wire_bytes == plain.wire_bytes
    assert [c.kind for c in plan.collectives] != [c.kind for c in plain.collectives]
    right = jax.tree.leaves(jax.jit(grad)(*ARGS))
    for got in (plan.run(*ARGS), plan.simulate(*ARGS)):
        for x, want in zip(jax.tree.leaves(got), right, strict=True):
            np.testing.assert_allclose(np.asarray(x), want, rtol=1e-4, atol=1e-5)


def test_why_a_ring_is_there() -> None:
    args = draw(8, 6), draw(6, 8)
    options = Options(overlap="always")
    plan = gspmd.plan(
        multiply, *args, mesh="x=4", in_specs=(P("x", None), P(None, "x")),
        out_specs=P(None, "x"), options=options,
    )  # fmt: skip
    assert {c.kind for c in plan.collectives} == {"collective_permute"}
    assert "dot_general" in plan.why(1)
    assert "the spec of x" in plan.why(1)


def test_none_leaves_all() -> None:
    args = draw(8, 6), draw(6, 8)
    plan = gspmd.plan(multiply, *args, mesh="x=4", in_specs=(P("x"), P(None, "x")))
    assert kinds(plan.program) == {"all_gather": 1}
