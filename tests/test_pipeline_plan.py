"""What a plan of a pipeline sends, runs and keeps: as much as its schedule promises."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType
from pipelines import (
    SCHEDULES,
    array,
    close,
    crossing,
    layers,
    loss_of,
    mlp,
    model,
    run_in_sequence,
)

import gspmd
from gspmd import P, annotate
from gspmd.bubble import Ticks
from gspmd.ir import Program
from gspmd.report import Report


@pytest.mark.parametrize("repeats", [1, 2])
def test_one_activation_a_tick_goes_from_stage_to_stage(repeats: int) -> None:
    """Forward and backward; what comes in and goes out does so once, outside of the loop."""
    p, m, rows, dim = 4, 8, 16, 8
    w, x = array(p * repeats, dim, dim), array(m, rows // m, dim, seed=1)
    if repeats > 1:
        w = w.reshape(repeats, p, dim, dim).swapaxes(0, 1)

    def piped(w: Any, x: Any) -> Any:
        return gspmd.pipeline(
            lambda w, x: jnp.tanh(x @ w), w, x, stages=p, schedule=SCHEDULES[repeats],
            repeats=repeats,
        )  # fmt: skip

    ticks = repeats * m + p - 1
    one, all_ = rows // m * dim * 4, rows * dim * 4
    mesh: dict[str, Any] = {"mesh": {"stage": p}, "in_specs": (P("stage"), None)}
    permute, out = ("collective_permute", ticks, one), ("all_reduce", 1, all_)
    assert crossing(gspmd.plan(piped, w, x, **mesh)) == [permute, out]
    plan = gspmd.plan(loss_of(piped), w, x, **mesh)
    assert crossing(plan) == [permute, out, permute, out]
    assert len(plan.collectives) == 4
    assert not plan.findings


@pytest.mark.parametrize(("repeats", "axis"), [(1, 4), (1, 2), (2, 2), (3, 4)])
def test_devices_run_as_many_stage_steps_as_the_formulas_say(repeats: int, axis: int) -> None:
    """Counted in the local program: `tanh` is what a stage does."""
    p, m = 4, 6
    w = array(p, repeats, 8, 8)[:, : repeats if repeats > 1 else 1]
    w = w if repeats > 1 else w[:, 0]

    def piped(w: Any, x: Any) -> Any:
        return gspmd.pipeline(
            lambda w, x: jnp.tanh(x @ w), w, x, stages=p, schedule=SCHEDULES[repeats],
            repeats=repeats, remat=True,
        )  # fmt: skip

    steps = (repeats * m + p - 1) * p // axis  # of which repeats * m * p // axis are not bubble
    for fn, tanhs, products in ((piped, 1, 1), (loss_of(piped), 2, 4)):
        plan = gspmd.plan(fn, w, array(m, 2, 8), mesh={"stage": axis}, in_specs=(P("stage"), None))
        assert executed(plan.program, "tanh") == tanhs * steps
        assert executed(plan.program, "dot_general") == products * steps


def executed(program: Program, name: str) -> int:
    """How often a device does `name` for one stage: results have a leading dim of stages."""
    return sum(trips * op.outs[0].shape[0] for op, trips in program.walk() if op.name == name)


@pytest.mark.parametrize("repeats", [1, 2])
def test_remat_keeps_what_goes_from_stage_to_stage(repeats: int) -> None:
    """One activation a tick; without it no weights, although stages pick theirs by the tick."""
    p, m, rows, dim, hidden = 2, 4, 4, 8, 64
    own = (p,) + (repeats,) * (repeats > 1)
    w = {"up": array(*own, dim, hidden), "down": array(*own, hidden, dim)}
    ticks = repeats * m + p - 1

    def kept(remat: bool) -> list[Any]:
        def piped(w: Any, x: Any, side: Any) -> Any:
            stage = lambda w, x, side: mlp(w, x) * side  # noqa: E731
            return gspmd.pipeline(
                stage, w, x, stages=p, schedule=SCHEDULES[repeats], repeats=repeats,
                sides=side, remat=remat,
            )  # fmt: skip

        args = w, array(m, rows, dim), array(m, rows, dim)
        gradient = jax.grad(lambda *args: jnp.sum(piped(*args) ** 2), (0, 1, 2))
        specs = (P("stage"), P(None, "batch"), P(None, "batch"))
        rules = {"batch": "data", "hidden": None}
        plan = gspmd.plan(gradient, *args, mesh="stage=2,data=2", in_specs=specs, rules=rules)
        forward = next(op for op in plan.program.ops if op.name == "scan")
        stacked = forward.outs[forward.params["num_carry"] :]
        return [x for x in stacked if jnp.issubdtype(x.dtype, jnp.inexact)]

    (boundary,) = kept(remat=True)
    assert boundary.shape == (ticks, 1, rows // 2, dim)
    weights = dim * hidden
    assert all(math.prod(x.shape) < ticks * weights for x in kept(remat=False))


def test_the_queue_is_updated_in_place() -> None:
    """Inputs, outputs, and what waits for its next round: the loop holds them once, uncopied."""
    p, m, rows, dim = 2, 6, 4, 8
    mesh = jax.make_mesh((p,), ("stage",), (AxisType.Auto,))
    apply = functools.partial(gspmd.pipeline, lambda w, x: jnp.tanh(x @ w), stages=p)
    args = array(p, dim, dim), array(m, rows, dim)
    text = gspmd.plan(apply, *args, mesh=mesh, in_specs=(P("stage"), None)).compile().as_text()
    assert text is not None
    (loop,) = (part for part in re.split(r"\n(?=%|ENTRY)", text) if "collective-permute" in part)
    queue = rf"f32\[1,{m + 1},{rows},{dim}\]"
    assert re.search(rf"= {queue}.*dynamic[-_]update[-_]slice", loop)
    assert not re.search(rf"= {queue}\S* copy\(", loop)


def test_sides_that_come_in_pieces_are_gathered_once() -> None:
    """Their rows lie split over the stages too: not in each tick does a stage send for its own."""
    p, m, rows, dim = 4, 8, 64, 8

    def loss(w: Any, x: Any, side: Any) -> Any:
        x, side = gspmd.to_microbatches((x, side), m)
        made = gspmd.pipeline(lambda w, x, s: jnp.tanh(x @ w) + s, w, x, stages=p, sides=side)
        return jnp.sum(jnp.sin(made))

    args = array(p, dim, dim), array(rows, dim, seed=1), array(rows, dim, seed=2)
    specs = P("stage"), P(("data", "stage")), P(("data", "stage"))
    gradient = jax.grad(loss, (0, 2))
    plan = gspmd.plan(gradient, *args, mesh="stage=4,data=2", in_specs=specs)
    over = crossing(plan)
    one = rows // m // 2 * dim * 4
    assert [c for c in over if c[1] > 1] == [("collective_permute", m + p - 1, one)] * 2
    assert [c for c in over if c[0] == "all_gather"] == [("all_gather", 1, m * one / p)] * 2
    close(plan.simulate(*args), gradient(*args))


@pytest.mark.parametrize("turns", [4, 5])
def test_a_report_tells_a_pipeline_from_a_loop_around_it(turns: int) -> None:
    """Also where both are of one line, and of 4 turns each."""
    args = array(2, 256, 256), array(3, 256, 256)
    tick = lambda w, x: jnp.tanh(x @ w)  # noqa: E731

    def report(turns: int) -> Report:
        fn = lambda w, x: lax.scan(lambda x, _: (gspmd.pipeline(tick, w, x, stages=2), None), x, None, turns)[0]  # noqa: E731,E501 # fmt: skip
        plan = gspmd.plan(jax.grad(lambda w, x: jnp.sum(fn(w, x))), *args, mesh="stage=2",
                          in_specs=(P("stage"), None))  # fmt: skip
        return plan.report("tpu-v4")

    found, (one,) = report(turns), report(1).pipelines
    (row,) = found.pipelines
    assert row.seconds == pytest.approx(turns * one.seconds)
    assert row.bubble == pytest.approx(row.seconds / 4)
    assert row.seconds < found.seconds.step


@pytest.mark.parametrize("remat", [False, True])
def test_a_bubble_is_no_use(remat: bool) -> None:
    """The FLOPs of the model are those without a pipeline, with remat or not; devices do more."""
    rows, micro, stages, dim, hidden = 64, 8, 2, 128, 256
    piped = loss_of(model(stages, micro, remat=remat))
    args = layers(4, dim, hidden), array(rows, dim)
    specs = (P("stage"), None)
    rules = {"batch": None, "hidden": None, "stage": "stage"}
    plan = gspmd.plan(piped, *args, mesh={"stage": 2}, in_specs=specs, rules=rules)
    made = plan.report("tpu-v4")
    forward = 4 * 2 * 2 * rows * dim * hidden
    assert made.flops.model == 3 * forward
    useful = 1 - Ticks(stages, micro).bubble
    assert made.flops.counted * stages * useful == pytest.approx(3 * forward)
    assert (made.flops.hardware > made.flops.counted) == remat


def test_planning_does_not_depend_on_microbatches_and_stages() -> None:
    def ops(p: int, m: int) -> int:
        args = layers(2 * p), array(2 * m, 8)
        plan = gspmd.plan(
            loss_of(model(p, m)), *args, mesh={"stage": p}, in_specs=(P("stage"), None),
            rules={"batch": None, "hidden": None},
        )  # fmt: skip
        return sum(1 for _ in plan.program.walk())

    assert ops(2, 4) == ops(8, 64)


def test_embedding_and_softmax_split_the_batch_over_the_stages() -> None:
    """What enters is gathered once, and what leaves scattered: half of what whole copies take."""
    vocab, dim, rows, p, m = 16, 8, 32, 2, 4

    def loss(w: Any, tokens: jax.Array, piped: bool = True) -> jax.Array:
        x = annotate(w["table"][tokens], P("rows", None))
        if piped:
            x = annotate(model(p, m)(w["layers"], x), P("rows", None))
        else:
            x = run_in_sequence(mlp, w["layers"], x)
        logits = annotate(x @ w["table"].T, P("rows", None))
        label = jax.nn.one_hot(tokens, vocab)
        return -jnp.mean(jnp.sum(label * jax.nn.log_softmax(logits), -1))

    w = {"table": array(vocab, dim), "layers": layers(4)}
    tokens = jnp.arange(rows) % vocab
    rules = {"rows": ("data", "stage"), "batch": "data", "hidden": None}
    specs = ({"table": P(), "layers": P("stage")}, P("rows"))
    plan = gspmd.plan(
        jax.value_and_grad(loss), w, tokens, mesh="stage=2,data=2", in_specs=specs, rules=rules
    )
    activation, ticks = rows // 2 * dim * 4, m + p - 1
    over = [c for c in plan.collectives if c.axes == ("stage",)]
    permutes = [c for c in over if c.kind == "collective_permute"]
    assert [(c.trips, c.bytes) for c in permutes] == [(ticks, activation / m)] * 2
    others = [c for c in over if c not in permutes]
    assert {c.kind for c in others} <= {"all_gather", "all_to_all", "reduce_scatter"}
    assert [(c.trips, c.wire_bytes) for c in others] == [(1, activation / 2)] * 4
    close(
        plan.simulate(w, tokens),
        jax.value_and_grad(functools.partial(loss, piped=False))(w, tokens),
    )
