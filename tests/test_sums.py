"""Sums that are owed: which ops let them pass, who is named for them, and what has effects."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import agrees, kinds
from jax import lax
from jax.experimental import io_callback

import gspmd
from gspmd import P

MESH = "x=3,y=2"


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("axis", "left", "right"),
    [(0, P(("x", "y")), P(("y", "x"))), ((0, 1), P("x", "y"), P("y", "x"))],
)
def test_sums_owed_over_the_same_axes_in_another_order(axis: Any, left: P, right: P) -> None:
    fn = lambda a, b: a.sum(axis) + b.sum(axis)  # noqa: E731
    plan = gspmd.plan(fn, floats(6, 4), floats(6, 4), mesh=MESH, in_specs=(left, right))
    agrees(plan, fn, floats(6, 4), floats(6, 4))
    assert kinds(plan) == {"all_reduce": 1}


def test_a_narrow_sum_that_may_wrap_does_not_pass_into_a_wide_product() -> None:
    def fn(a: jax.Array, b: jax.Array, w: jax.Array) -> jax.Array:
        numbers = (((1,), (0,)), ((), ()))
        h = lax.dot_general(a, b, numbers)  # int8, modulo 256
        return lax.dot_general(h, w, numbers, preferred_element_type=jnp.int32)

    draw = np.random.default_rng(0).integers
    args = [draw(-100, 100, s).astype(np.int8) for s in ((12, 6), (6, 300), (300, 2))]
    specs = (P(None, "x"), P("x"), P())
    agrees(gspmd.plan(fn, *args, mesh=MESH, in_specs=specs, out_specs=P()), fn, *args)


def test_a_sum_does_not_pass_a_division_whose_divisor_may_be_zero() -> None:
    fn = lambda a, n: jnp.sum(a, 0) / n  # noqa: E731
    args = floats(6, 4), np.zeros(4, np.float32)
    plan = gspmd.plan(fn, *args, mesh=MESH, in_specs=(P("x"), P()))
    np.testing.assert_array_equal(plan.simulate(*args), fn(*args))


def test_the_op_that_sums_is_named_and_not_one_on_another_operand() -> None:
    def fn(scale: jax.Array, h: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.tanh(scale.sum(0)) * (h @ w)

    args = floats(4, 5), floats(3, 4), floats(4, 5)
    plan = gspmd.plan(fn, *args, mesh="x=2", in_specs=(P("x"), P(None, "x"), P("x")))
    assert "a sum over x is owed: dot_general" in plan.why(2)
    assert "the spec of h" in plan.why(2)
    assert "scale" not in plan.why(2)


def test_a_combined_collective_answers_for_all_its_parts() -> None:
    def fn(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        first = a.sum(0)
        second = b.max(0).sum() + b.sum(0)
        return first, second

    plan = gspmd.plan(fn, floats(8, 8), floats(8, 9), mesh="x=2", in_specs=(P("x"), P("x")))
    (one,) = [c for c in plan.collectives if "," in c.type]
    lines = {text.split(" at ")[1].split()[0] for text in one.why.split("\n") if " at " in text}
    assert len(lines) == 2
    for line in lines:
        assert f"#{one.number} all_reduce" in plan.why(line)
    assert "a maximum over x is owed" in "".join(c.why for c in plan.collectives)


def test_a_product_sends_what_the_table_says() -> None:
    fn = lambda x: x.prod(0)  # noqa: E731
    plan = gspmd.plan(fn, floats(6, 12), mesh="x=6", in_specs=P("x"))
    agrees(plan, fn, floats(6, 12))
    assert plan.wire_bytes == 2 * 5 / 6 * 12 * 4
    text = plan.executable.lower().as_text()
    assert "all_to_all" in text, "each device reduces a piece, which all then gather"


def test_effects_happen_though_nobody_reads_their_results() -> None:
    hits: list[int] = []

    def note(x: np.ndarray) -> np.ndarray:
        hits.append(1)
        return np.float32(0)

    def fn(x: jax.Array) -> jax.Array:
        io_callback(note, jax.ShapeDtypeStruct((), jnp.float32), x.sum())

        def body(carry: jax.Array, _: None) -> tuple[jax.Array, None]:
            jax.debug.callback(note, carry.sum())
            return carry + 1, None

        lax.scan(body, x, None, length=3)
        return x * 2

    plan = gspmd.plan(fn, floats(6, 4), mesh="x=2", in_specs=P("x"))
    agrees(plan, fn, floats(6, 4))
    jax.effects_barrier()
    assert len(hits) >= 2 * (1 + 3)  # once in the plan's run, once in the function's own


def test_random_draws_are_not_merged() -> None:
    draw = lambda: (lax.rng_uniform(0.0, 1.0, (4,)), lax.rng_uniform(0.0, 1.0, (4,)))  # noqa: E731
    assert str(gspmd.plan(draw, mesh=MESH)).count("rng_uniform") == 2


def test_strict_lets_pass_what_gathers_nothing() -> None:
    def fn(x: jax.Array) -> jax.Array:
        jax.debug.callback(lambda _: None, x.sum())
        return x * 2

    plan = gspmd.plan(fn, floats(6, 4), mesh=MESH, in_specs=P(), strict=True)
    assert [finding.code for finding in plan.findings] == ["no-rule"]


# --- out of a loop


def squared_error(w: jax.Array, x: jax.Array) -> jax.Array:
    return ((jnp.tanh(x @ w)) ** 2).sum()


def accumulated(w: jax.Array, batches: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The loss and its gradient, added up over microbatches."""

    def add(total: tuple[jax.Array, jax.Array], x: jax.Array) -> tuple[Any, None]:
        loss, gradient = jax.value_and_grad(squared_error)(w, x)
        return (total[0] + loss, total[1] + gradient), None

    return lax.scan(add, (jnp.float32(0), jnp.zeros_like(w)), batches)[0]


@pytest.mark.parametrize("microbatches", [1, 5])
def test_gradients_accumulated_in_a_scan_are_reduced_once_after_it(microbatches: int) -> None:
    w, batches = floats(6, 8), floats(microbatches, 12, 6)
    plan = gspmd.plan(accumulated, w, batches, mesh="x=4", in_specs=(P(), P(None, "x")))
    assert [(c.kind, c.trips) for c in plan.collectives] == [("all_reduce", 1)]
    assert plan.wire_bytes == 2 * 3 / 4 * (w.nbytes + 4)
    agrees(plan, accumulated, w, batches)


def test_a_carry_that_is_read_pays_in_each_step() -> None:
    def total(x: jax.Array) -> jax.Array:
        def add(carry: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
            carry = carry + row.sum()
            return carry, jnp.exp(-carry)

        return lax.scan(add, jnp.float32(0), x)[1]

    x = floats(5, 12)
    plan = gspmd.plan(total, x, mesh="x=4", in_specs=(P(None, "x"),))
    assert [(c.kind, c.trips) for c in plan.collectives] == [("all_reduce", 5)]
    agrees(plan, total, x)


def descended(w: jax.Array, batches: jax.Array) -> jax.Array:
    return w - accumulated(w, batches)[1]


@pytest.mark.parametrize(("room", "reductions"), [(8 * 8 * 3, 1), (8 * 8 * 3 - 1, 3)])
def test_a_split_carry_is_held_whole_where_there_is_room(room: int, reductions: int) -> None:
    """Three quarters of the full gradient come on top of the shard that a device has anyway."""
    w, batches = floats(8, 8), floats(3, 12, 8)
    plan = gspmd.plan(
        descended,
        w,
        batches,
        mesh="x=4",
        in_specs=(P("x"), P(None, "x")),
        options=gspmd.Options(room=room),
    )
    scattered = [c for c in plan.collectives if c.kind == "reduce_scatter"]
    assert [c.trips for c in scattered] == [reductions]
    agrees(plan, descended, w, batches)


@pytest.mark.parametrize("split", [P(), P(None, "x")], ids=["whole", "split"])
def test_gradients_of_scanned_layers_are_reduced_once_after_the_microbatches(split: P) -> None:
    """From a product in a rematerialized layer, through two loops and an annotation."""

    @jax.checkpoint
    def layer(h: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.tanh(h @ gspmd.annotate(w, P(*split[1:])))

    def loss(w: jax.Array, batch: jax.Array) -> jax.Array:
        h, _ = lax.scan(lambda h, w: (layer(h, w), None), batch, w)
        return jnp.sum(jnp.square(h))

    def step(w: jax.Array, batches: jax.Array) -> jax.Array:
        def add(total: jax.Array, batch: jax.Array) -> tuple[jax.Array, None]:
            return total + jax.grad(loss)(w, batch), None

        return w - 0.01 * lax.scan(add, jnp.zeros_like(w), batches)[0]

    w, batches = 0.3 * floats(2, 8, 8), floats(3, 12, 8)
    plan = gspmd.plan(step, w, batches, mesh="x=4", in_specs=(split, P(None, "x")), out_specs=split)
    sums = [c for c in plan.collectives if c.kind in ("reduce_scatter", "all_reduce")]
    assert [(c.kind, c.trips) for c in sums] == [
        ("reduce_scatter" if any(split) else "all_reduce", 1)
    ]
    agrees(plan, step, w, batches)


def test_sums_under_a_mask_are_reduced_once_after_the_loops() -> None:
    """As in the bubble of a pipeline; the mask, a broadcast, is made whole and not gathered."""

    def loss(w: jax.Array, batch: jax.Array) -> jax.Array:
        h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), batch, w)
        return jnp.sum(jnp.square(h))

    def step(w: jax.Array, batches: jax.Array, valid: jax.Array) -> jax.Array:
        def add(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            batch, valid_L = part
            gradient = jax.grad(loss)(w, batch)
            return total + jnp.where(valid_L[:, None, None], gradient, 0.0), None

        return lax.scan(add, jnp.zeros_like(w), (batches, valid))[0]

    w, batches = 0.3 * floats(2, 8, 8), floats(3, 12, 8)
    valid = np.asarray([[True, False], [True, True], [False, True]])
    split = P(None, "x")
    plan = gspmd.plan(
        step, w, batches, valid, mesh="x=4", in_specs=(split, P(None, "x"), P()), out_specs=split
    )
    sums = [c for c in plan.collectives if c.kind != "all_gather"]
    assert [(c.kind, c.trips) for c in sums] == [("reduce_scatter", 1)]
    gathered = [op.ins[0].dtype for op, _ in plan.program.walk() if op.name == "all_gather"]
    assert set(gathered) == {jnp.dtype("float32")}
    agrees(plan, step, w, batches, valid)


@pytest.mark.parametrize("split", [P("x"), P(None, "x")])
def test_a_reshape_that_transposes_keeps_its_dims_split(split: P) -> None:
    fn = lambda x: lax.reshape(x, (4, 2, 3), (1, 0))  # noqa: E731
    x = floats(6, 4)
    plan = gspmd.plan(fn, x, mesh="x=2", in_specs=(split,))
    assert not plan.collectives
    agrees(plan, fn, x)
