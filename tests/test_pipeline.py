"""A pipeline computes what its stages compute in sequence, in the ticks and bytes it promises."""

import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType

import gspmd
from gspmd import P, PipelineError, annotate
from gspmd.bubble import Ticks
from gspmd.ir import Program
from gspmd.testing import assert_equivalent

SCHEDULES = {1: "gpipe", 2: "circular", 3: "circular"}


def array(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(scale=0.5, size=shape), jnp.float32)


def close(found: Any, expected: Any) -> None:
    """Both trees are alike, integers exactly."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (jnp.shape(a), jnp.result_type(a)) == (jnp.shape(b), jnp.result_type(b))
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)


# ---------------------------------------------------------------------------------- the schedule


@pytest.mark.parametrize("stages", range(1, 6))
@pytest.mark.parametrize("repeats", range(1, 4))
def test_the_ticks_by_hand(stages: int, repeats: int) -> None:
    """With lists for arrays: each microbatch meets all stages in order, and nothing gets lost."""
    for micro in range(1, 9):
        ticks = Ticks(stages, micro, repeats)
        steps = ticks.steps()
        queue: list[Any] = [(i, ()) for i in range(micro)] + [None] * (ticks.places - micro)
        at: list[Any] = [None] * stages
        at[0], queue[0], busy = queue[0], None, 0
        for t in range(ticks.count):
            for s in range(stages):
                now, round_, i = (x[t, s] for x in (steps.at.valid, steps.at.round, steps.at.micro))
                assert now == (at[s] is not None)
                if now:
                    assert i == at[s][0]
                    at[s] = (i, (*at[s][1], round_ * stages + s))
                    busy += 1
            at = [at[-1], *at[:-1]]
            assert queue[steps.leaves[t]] is None  # what is overwritten has been taken
            queue[steps.leaves[t]], at[0] = at[0], queue[steps.enters[t]]
            at[0], queue[steps.enters[t]] = queue[steps.enters[t]], None
        assert queue[:micro] == [(i, tuple(range(stages * repeats))) for i in range(micro)]
        assert busy == stages * repeats * micro
        assert ticks.bubble == pytest.approx(1 - busy / (stages * ticks.count))


@pytest.mark.parametrize("p", [1, 2, 4, 8])
@pytest.mark.parametrize("m", [8, 9, 64])
def test_the_bubble_is_that_of_the_formulas(p: int, m: int) -> None:
    for v in (1, 2, 4):
        ticks = Ticks(p, m, v)
        assert ticks.count == v * m + p - 1
        assert ticks.bubble == pytest.approx((p - 1) / (v * m + p - 1))


# ------------------------------------------------------------------------- the law, on one device


def sequence(
    stage: Callable[..., Any],
    params: Any,
    xs: Any,
    sides: Any,
    cache: Any,
    state: Any,
    repeats: int,
) -> Any:
    """What a pipeline must compute: loops over microbatches, rounds and stages."""
    stages = jax.tree.leaves(params)[0].shape[0]
    micro = jax.tree.leaves(xs)[0].shape[0]
    kept = {name: tree for name, tree in (("cache", cache), ("state", state)) if tree is not None}
    outs: list[Any] = []
    for i in range(micro):
        x = entry(xs, (i,))
        for r in range(repeats):
            for s in range(stages):
                own = (s, r) if repeats > 1 else (s,)
                at = {"cache": (*own, i), "state": own}
                side = () if sides is None else (entry(sides, (i,)),)
                held = [entry(tree, at[name]) for name, tree in kept.items()]
                made = stage(entry(params, own), x, *side, *held)
                x, *new = made if kept else (made,)
                for name, one in zip(kept, new, strict=True):
                    put = functools.partial(with_entry, at=at[name])
                    kept[name] = jax.tree.map(put, kept[name], one)
        outs.append(x)
    y = jax.tree.map(lambda *each: jnp.stack(each), *outs)
    return (y, *kept.values()) if kept else y


def entry(tree: Any, at: tuple[int, ...]) -> Any:
    return jax.tree.map(lambda a: a[at], tree)


def with_entry(a: jax.Array, x: jax.Array, at: tuple[int, ...]) -> jax.Array:
    return a.at[at].set(x)


def general(given: tuple[bool, bool, bool]) -> Callable[..., Any]:
    """A stage whose output depends on all that it is given, in an order that shows."""

    def stage(w: Any, x: Any, *more: Any) -> Any:
        left, kept = list(more), []
        y = jnp.tanh(x["y"] @ w["a"] + w["b"]) + x["y"]
        if given[0]:
            y = y * left.pop(0)["scale"]
        if given[1]:
            cache = left.pop(0)
            kept.append({"sum": jnp.tanh(cache["sum"] + y), "seen": cache["seen"] + 1})
            y = y + 0.3 * cache["sum"]
        if given[2]:
            state = left.pop(0)
            y = y * jnp.cos(state[0])
            kept.append((state[0] + jnp.mean(y), jnp.maximum(state[1], x["n"])))
        out = {"y": y, "n": 2 * x["n"] + 1, "odd": ~x["odd"]}
        return (out, *kept) if kept else out

    return stage


def arguments(stages: int, micro: int, repeats: int, given: tuple[bool, bool, bool]) -> list[Any]:
    """Parameters, microbatches, sides, cache and state for `general`."""
    own, rows, dim = (stages,) + (repeats,) * (repeats > 1), 3, 4
    xs = {
        "y": array(micro, rows, dim, seed=1),
        "n": jnp.arange(micro, dtype=jnp.int32),
        "odd": jnp.arange(micro) % 2 == 1,
    }
    cache = {"sum": array(*own, micro, rows, dim, seed=2), "seen": jnp.ones((*own, micro), int)}
    state = (array(*own, seed=3), jnp.zeros(own, jnp.int32))
    more = ({"scale": 1 + array(micro, dim, seed=4)}, cache, state)
    params = {"a": array(*own, dim, dim, seed=5), "b": array(*own, dim, seed=6)}
    return [params, xs, *(x if there else None for x, there in zip(more, given, strict=True))]


def with_gradient(fn: Callable[..., Any], args: list[Any]) -> Any:
    """The results of `fn`, and the gradient of a weighted sum by all float arguments."""
    leaves, tree = jax.tree.flatten(args)
    smooth = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]

    def loss(*floats: Any) -> tuple[jax.Array, Any]:
        left = iter(floats)
        mixed = [next(left) if s else x for x, s in zip(leaves, smooth, strict=True)]
        outs = fn(*jax.tree.unflatten(tree, mixed))
        floats = [x for x in jax.tree.leaves(outs) if jnp.issubdtype(x.dtype, jnp.inexact)]
        return sum(jnp.sum(x * jnp.cos(jnp.arange(x.size).reshape(x.shape))) for x in floats), outs

    floats = [x for x, s in zip(leaves, smooth, strict=True) if s]
    return jax.grad(loss, range(len(floats)), has_aux=True)(*floats)


def check_law(
    stages: int, micro: int, repeats: int, given: tuple[bool, bool, bool], remat: Any
) -> None:
    stage, args = general(given), arguments(stages, micro, repeats, given)

    def piped(params: Any, xs: Any, sides: Any, cache: Any, state: Any) -> Any:
        return gspmd.pipeline(
            stage, params, xs, stages=stages, schedule=SCHEDULES[repeats], repeats=repeats,
            remat=remat, sides=sides, cache=cache, state=state,
        )  # fmt: skip

    found = jax.jit(lambda args: with_gradient(piped, args))(args)
    plain = functools.partial(sequence, stage, repeats=repeats)
    close(found, with_gradient(plain, args))


CASES = [
    (3, 4, 1, (True, True, True), False),
    (2, 3, 2, (True, True, True), True),
    (4, 2, 1, (False, False, False), jax.checkpoint_policies.dots_saveable),
]


@pytest.mark.parametrize(("stages", "micro", "repeats", "given", "remat"), CASES)
def test_it_computes_what_the_stages_do_in_sequence(
    stages: int, micro: int, repeats: int, given: tuple[bool, bool, bool], remat: Any
) -> None:
    check_law(stages, micro, repeats, given, remat)


@pytest.mark.exhaustive
@hypothesis.settings(max_examples=150)
@hypothesis.given(
    stages=st.integers(1, 5),
    micro=st.integers(1, 7),
    repeats=st.integers(1, 3),
    given=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    remat=st.sampled_from([False, True, jax.checkpoint_policies.dots_saveable]),
)
def test_it_always_computes_what_the_stages_do_in_sequence(
    stages: int, micro: int, repeats: int, given: tuple[bool, bool, bool], remat: Any
) -> None:
    check_law(stages, micro, repeats, given, remat)


@pytest.mark.parametrize(("repeats", "remat"), [(1, False), (2, True)])
def test_nan_in_the_bubble_reaches_nothing(repeats: int, remat: bool) -> None:
    """The stage is NaN where its input is zero, and so is its gradient by all that it sees."""
    stages, micro = 3, 2
    own = (stages,) + (repeats,) * (repeats > 1)
    args = [
        array(*own, 4), array(micro, 4, seed=1), array(micro, 4, seed=2),
        array(*own, micro, 4, seed=3), array(*own, 4, seed=4), array(4, seed=5),
    ]  # fmt: skip

    def run(piped: bool, w: Any, xs: Any, sides: Any, cache: Any, state: Any, near: Any) -> Any:
        def stage(w: Any, x: Any, side: Any, old: Any, sums: Any) -> Any:
            y = x / jnp.sqrt(jnp.sum(x**2)) * w * side * near + old * x / x
            return y + 0.1 * sums, old + y, sums + y / jnp.sum(jnp.abs(x))

        if not piped:
            return sequence(stage, w, xs, sides, cache, state, repeats)
        more = {"repeats": repeats, "remat": remat}
        return gspmd.pipeline(
            stage, w, xs, stages=stages, schedule=SCHEDULES[repeats],
            sides=sides, cache=cache, state=state, **more,
        )  # fmt: skip

    found = jax.jit(lambda args: with_gradient(functools.partial(run, True), args))(args)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(found))
    close(found, with_gradient(functools.partial(run, False), args))


def test_it_is_differentiated_twice_and_mapped() -> None:
    w, xs = array(2, 3, 3), array(3, 2, 3, seed=1)
    stage = lambda w, x: jnp.tanh(x @ w)  # noqa: E731
    piped = lambda w, xs: jnp.sum(gspmd.pipeline(stage, w, xs, stages=2) ** 2)  # noqa: E731
    plain = lambda w, xs: jnp.sum(sequence(stage, w, xs, None, None, None, 1) ** 2)  # noqa: E731
    twice = lambda fn: jax.jit(lambda: jax.jvp(jax.grad(fn), (w, xs), (w, xs)))()  # noqa: E731
    close(twice(piped), twice(plain))
    both, mapped = jnp.stack([w, 2 * w]), jax.jit(jax.vmap(jax.grad(piped), (0, None)))
    close(mapped(both, xs), jnp.stack([jax.jit(jax.grad(plain))(one, xs) for one in both]))


# ------------------------------------------------------------------------ layers, and microbatches


def mlp(w: Any, x: jax.Array) -> jax.Array:
    """A residual MLP: its roles are those of Megatron's."""
    h = annotate(jnp.tanh(annotate(x, P("batch", None)) @ w["up"]), P("batch", "hidden"))
    return x + annotate(h @ w["down"], P("batch", None))


def layers(count: int, dim: int = 8, hidden: int = 16) -> dict[str, jax.Array]:
    return {"up": array(count, dim, hidden), "down": array(count, hidden, dim, seed=1)}


def run_in_sequence(layer: Callable[..., Any], w: Any, x: Any) -> Any:
    for i in range(jax.tree.leaves(w)[0].shape[0]):
        x = layer(jax.tree.map(lambda a, i=i: a[i], w), x)
    return x


def model(
    stages: int, micro: int, repeats: int = 1, layer: Callable[..., Any] = mlp, **options: Any
) -> Callable[..., Any]:
    """A function of layers and a batch, by a pipeline."""

    def apply(w: Any, batch: jax.Array) -> jax.Array:
        made = gspmd.pipeline(
            gspmd.run_layers(layer), gspmd.stack_stages(w, stages, repeats),
            gspmd.to_microbatches(batch, micro), stages=stages, schedule=SCHEDULES[repeats],
            repeats=repeats, **options,
        )  # fmt: skip
        return gspmd.from_microbatches(made, batch.shape[0])

    return apply


@pytest.mark.parametrize(
    ("count", "stages", "repeats", "rows", "micro"),
    [(5, 3, 1, 7, 3), (5, 2, 2, 10, 4)],
)
def test_layers_and_rows_that_do_not_divide(
    count: int, stages: int, repeats: int, rows: int, micro: int
) -> None:
    args = [layers(count), array(rows, 8, seed=2)]
    found = jax.jit(lambda args: with_gradient(model(stages, micro, repeats), args))(args)
    close(found, with_gradient(functools.partial(run_in_sequence, mlp), args))


def test_what_is_in_the_place_of_a_layer_gets_no_gradient() -> None:
    """Also where the stacked stages are what is trained; a layer may be NaN of no input."""
    stacked, there = gspmd.stack_stages(layers(5), 3)
    assert there is not None
    assert there.tolist() == [[True, True], [True, True], [True, False]]

    def loss(stacked: Any) -> jax.Array:
        xs = array(2, 3, 8, seed=2)
        stage = gspmd.run_layers(lambda w, x: mlp(w, x / jnp.sqrt(jnp.sum(x**2))))
        return jnp.sum(gspmd.pipeline(stage, (stacked, there), xs, stages=3) ** 2)

    for name, gradient in jax.jit(jax.grad(loss))(stacked).items():
        assert not np.any(gradient[2, 1]), name
        assert np.all(np.any(gradient[0], axis=(1, 2))), name
        assert np.all(np.isfinite(gradient)), name
    assert gspmd.stack_stages(layers(6), 3)[1] is None


def test_layers_that_keep_something() -> None:
    """A cache of each layer, and a sum; of layers that are not there they stay as they are."""
    w, xs = layers(3), array(2, 3, 8, seed=2)
    sides, cache = array(2, 8, seed=3), array(3, 2, 3, 8, seed=4)

    def layer(w: Any, x: Any, side: Any, old: Any, total: Any) -> Any:
        y = mlp(w, x) * side + old
        return y, x, total + jnp.sum(y)

    params = gspmd.stack_stages(w, 2)
    kept, _ = gspmd.stack_stages(cache, 2)  # [stages, layers, microbatches, ...]
    y, after, total = gspmd.pipeline(
        gspmd.run_layers(layer, keeps=2), params, xs, stages=2, sides=sides,
        cache=kept.swapaxes(1, 2), state=jnp.zeros((2, 2)),
    )  # fmt: skip
    state, made = [0.0] * 3, []
    for i in range(2):
        x = xs[i]
        for n in range(3):
            w_n = jax.tree.map(lambda a, n=n: a[n], w)
            x, cache_n, state[n] = layer(w_n, x, sides[i], cache[n, i], state[n])
            close(after[n // 2, i, n % 2], cache_n)
        made.append(x)
    close(y, jnp.stack(made))
    close(total, jnp.asarray([state[:2], [state[2], 0.0]]))
    close(after[1, :, 1], kept[1, 1])


@hypothesis.settings(max_examples=6)
@hypothesis.given(rows=st.integers(1, 9), data=st.data())
def test_microbatches_are_rows_and_come_back(rows: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, rows))
    batch = {"a": jnp.arange(rows), "b": array(rows, 2)}
    cut = gspmd.to_microbatches(batch, count)
    size = -(-rows // count)
    assert cut["a"].shape == (count, size)
    close(gspmd.from_microbatches(cut, rows), batch)
    assert all(
        int(cut["a"][i, j]) == (i + j * count) % rows for i in range(count) for j in range(size)
    )


def test_a_split_batch_is_cut_where_it_is() -> None:
    fn = lambda x: gspmd.to_microbatches(x, 4)  # noqa: E731
    plan = gspmd.plan(fn, array(16, 3), mesh="data=4", in_specs=P("data"))
    assert not plan.collectives
    assert plan.out_specs == P(None, "data", None)


# --------------------------------------------------------------------------- the partitioned plan


def crossing(plan: gspmd.Plan, axis: str = "stage") -> list[tuple[str, int, float]]:
    """The collectives over an axis: their kind, how often they run, and their operand's bytes."""
    return [(c.kind, c.trips, c.bytes) for c in plan.collectives if axis in c.axes]


def loss_of(apply: Callable[..., Any]) -> Callable[..., Any]:
    return jax.value_and_grad(lambda w, x: jnp.sum(jnp.sin(apply(w, x))), (0, 1))


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


# -------------------------------------------------------------------------------------- nested


def attention(w: Any, x: jax.Array) -> jax.Array:
    """An attention block and an MLP, as in a Transformer."""
    x = annotate(x, P("batch", None, "embed_act"))
    w_qkv = annotate(w["qkv"], P(None, "embed", "heads", None))
    q, k, v = annotate(
        jnp.einsum("bsm,cmnd->cbsnd", x, w_qkv), P(None, "batch", None, "heads", None)
    )
    weight = jax.nn.softmax(jnp.einsum("bsnd,btnd->bnst", q, k))
    y = jnp.einsum("bnst,btnd->bsnd", weight, v)
    y = jnp.einsum("bsnd,ndm->bsm", y, annotate(w["o"], P("heads", None, "embed")))
    x = x + annotate(y, P("batch", None, "embed_act"))
    h = jax.nn.gelu(jnp.einsum("bsm,mh->bsh", x, annotate(w["up"], P("embed", "hidden"))))
    y = annotate(h, P("batch", None, "hidden")) @ annotate(w["down"], P("hidden", "embed"))
    return x + annotate(y, P("batch", None, "embed_act"))


def experts(w: Any, x: jax.Array) -> jax.Array:
    """A mixture of experts: each group sends its tokens, all to all, and gets them back."""
    x = annotate(x, P("batch", None, None))
    share = jax.nn.softmax(jnp.einsum("gsm,me->gse", x, w["gate"]))
    sent = annotate(jnp.einsum("gse,gsm->egsm", share, x), P(None, "batch", None, None))
    sent = annotate(sent, P("expert", None, None, None))
    h = jax.nn.relu(jnp.einsum("egsm,emh->egsh", sent, w["up"]))
    back = jnp.einsum("egsh,ehm->egsm", h, w["down"])
    back = annotate(annotate(back, P("expert", None, None, None)), P(None, "batch", None, None))
    return x + jnp.sum(back, axis=0)


def images(w: Any, x: jax.Array) -> jax.Array:
    """A convolution over rows of images, which are cut into strips."""
    x = annotate(x, P("batch", "rows", None))
    y = lax.conv_general_dilated(
        x, w["kernel"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    )
    return annotate(x + jnp.tanh(y), P("batch", "rows", None))


def nested(layer: Callable[..., Any]) -> tuple[Any, jax.Array]:
    """Four layers and a batch for `layer`."""
    L, B, S, M, H, N, D, E = 4, 16, 8, 8, 16, 4, 4, 4
    weights: dict[Any, Any] = {
        mlp: layers(L),
        attention: {  # small, or scores are so large that a rounding changes what is attended to
            name: w / 4 for name, w in {
                "qkv": array(L, 3, M, N, D), "o": array(L, N, D, M, seed=1), **layers(L, M, H),
            }.items()
        },
        experts: {
            "gate": array(L, M, E), "up": array(L, E, M, H), "down": array(L, E, H, M, seed=1),
        },
        images: {"kernel": array(L, 3, M, M)},
    }  # fmt: skip
    return weights[layer], array(B, M, seed=2) if layer is mlp else array(B, S, M, seed=2)


NAMES = ("batch", "hidden", "heads", "embed", "embed_act", "expert", "rows")
TABLES: dict[str, dict[str, str]] = {
    "data": {"batch": "data"},
    "fsdp": {"batch": "data", "embed": "data"},
    "tensor": {"batch": "data", "hidden": "model", "heads": "model"},
    "2d": {
        "batch": "data", "hidden": "model", "heads": "model", "embed": "data",
        "embed_act": "model",
    },
    "expert": {"batch": "data", "expert": "data"},
    "spatial": {"batch": "data", "rows": "model"},
}  # fmt: skip
MESHES = ("stage=2,data=2,model=2", "stage=4,data=2,model=1", "stage=2,data=1,model=4")
NESTED = [
    (mlp, "tensor"), (mlp, "data"), (attention, "fsdp"), (attention, "tensor"), (attention, "2d"),
    (experts, "expert"), (images, "spatial"),
]  # fmt: skip
FAST = ((mlp, "tensor", 2), (attention, "fsdp", 1))


def rules_of(table: str, stage: str | None = "stage") -> dict[str, str | None]:
    return {**dict.fromkeys(NAMES), **TABLES[table], "stage": stage}


def cases(fast: Callable[[Any], bool]) -> Iterator[Any]:
    for layer, table in NESTED:
        for repeats in (1, 2):
            case = layer, table, repeats
            yield pytest.param(*case, marks=() if fast(case) else pytest.mark.exhaustive)


def nest(layer: Callable[..., Any], repeats: int) -> tuple[Callable[..., Any], Any, jax.Array]:
    """The loss and gradients of four layers in two stages, their weights dealt out, a batch."""
    w, x = nested(layer)

    def piped(stacked: Any, x: jax.Array) -> jax.Array:
        made = gspmd.pipeline(
            gspmd.run_layers(layer), stacked, gspmd.to_microbatches(x, 4), stages=2,
            schedule=SCHEDULES[repeats], repeats=repeats,
        )  # fmt: skip
        return gspmd.from_microbatches(made, x.shape[0])

    return loss_of(piped), gspmd.stack_stages(w, 2, repeats), x


@pytest.mark.parametrize(
    ("layer", "table", "repeats"), list(cases(lambda case: case[2] == 1 or case in FAST))
)
def test_nested_within_a_stage_nothing_is_sent_that_is_not_without_one(
    layer: Callable[..., Any], table: str, repeats: int
) -> None:
    """Over "stage" go activations alone; over the other axes what the strategy sends anyway."""
    fn, stacked, x = nest(layer, repeats)
    plan = gspmd.plan(
        fn, stacked, x, mesh=MESHES[0], in_specs=(P("stage"), P("batch")), rules=rules_of(table)
    )
    ticks, ways = repeats * 4 + 1, [c for c in plan.collectives if "stage" in c.axes]
    split = 4 if table in ("2d", "spatial") else 2
    one = x.size * 4 // split // 4
    assert [(c.kind, c.trips, c.bytes) for c in ways] == [
        ("collective_permute", ticks, one), ("all_reduce", 1, 4 * one),
    ] * 2  # fmt: skip
    assert not plan.findings
    in_loops = {c.kind for c in plan.collectives if c.trips > 1 and c.axes == ("data",)}
    assert in_loops == {"fsdp": {"all_gather"}, "2d": {"all_gather"}, "expert": {"all_to_all"}}.get(
        table, set()
    )  # gradients of weights are summed over "data" once, after the loop


@pytest.mark.parametrize(("layer", "table", "repeats"), list(cases(lambda case: case in FAST)))
def test_nested_within_a_stage_as_without_one(
    layer: Callable[..., Any], table: str, repeats: int
) -> None:
    """A table turns the pipeline off, with the same values: a stage's devices then take batch."""
    fn, stacked, x = nest(layer, repeats)
    how: dict[str, Any] = {"mesh": MESHES[0], "in_specs": (P("stage"), P("batch"))}
    plan = gspmd.plan(fn, stacked, x, rules=rules_of(table), **how)
    rules = {**rules_of(table, None), "batch": ("data", "stage")}
    off = gspmd.plan(fn, stacked, x, rules=rules, **how)
    assert not [c for c in crossing(off) if c[0] == "collective_permute"]
    plain = jax.jit(loss_of(functools.partial(run_in_sequence, layer)))(nested(layer)[0], x)
    for made in (plan, off):
        value, (gradient, by_x) = made.simulate(stacked, x)
        close((value, by_x), (plain[0], plain[1][1]))
        close(gradient[0], gspmd.stack_stages(plain[1][0], 2, repeats)[0])


@pytest.mark.exhaustive
@pytest.mark.parametrize("on", ["simulated", "devices"])
@pytest.mark.parametrize(
    ("mesh", "repeats"),  # four layers are too few for four stages twice
    [(mesh, n) for n in (1, 2) for mesh in MESHES if n == 1 or "stage=4" not in mesh],
)
@pytest.mark.parametrize(("layer", "table"), NESTED)
def test_nested_on_every_mesh(
    layer: Callable[..., Any], table: str, repeats: int, mesh: str, on: Any
) -> None:
    w, x = nested(layer)
    p = 4 if "stage=4" in mesh else 2
    fn = loss_of(model(p, 3, repeats, layer, remat=True))
    specs = (P("stage") if repeats == 1 else None, P("batch"))
    how: dict[str, Any] = {"mesh": mesh, "rules": rules_of(table), "in_specs": specs, "on": on}
    assert_equivalent(fn, w, x, grad=False, rtol=1e-3, **how)


@pytest.mark.parametrize("repeats", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_on_devices_it_is_what_it_is_in_sequence(repeats: int) -> None:
    w, x = nested(mlp)
    mesh = jax.make_mesh((2, 2, 2), ("stage", "data", "model"), (AxisType.Auto,) * 3)
    fn = gspmd.partition(
        loss_of(model(2, 3, repeats)), mesh, in_specs=(None, P("batch")), rules=rules_of("tensor")
    )
    close(fn(w, x), loss_of(functools.partial(run_in_sequence, mlp))(w, x))


@pytest.mark.parametrize("stages", [3, 6])
def test_stages_that_the_axis_does_not_divide(stages: int) -> None:
    w, x = layers(stages), array(4, 8, seed=2)
    fn = loss_of(model(stages, 2))
    assert_equivalent(fn, w, x, mesh="stage=4", in_specs=(None, None), grad=False,
                      rules={"batch": None, "hidden": None})  # fmt: skip


def test_a_stage_with_a_loop_and_sides_that_are_learned() -> None:
    """The encoder's output reaches all stages; its gradient is summed over them once."""
    p, m, rows, dim = 2, 4, 8, 8

    def loss(w: Any, x: jax.Array, memory: jax.Array) -> jax.Array:
        stage = gspmd.run_layers(lambda w, x, memory: mlp(w, x + jnp.tanh(memory)))
        made = gspmd.pipeline(stage, w, x, stages=p, sides=memory, remat=True)
        return jnp.sum(made**2)

    w = gspmd.stack_stages(layers(4), p)
    args = w, array(m, rows, dim), array(m, rows, dim, seed=3)
    specs = (P("stage"), P(None, "batch"), P(None, "batch"))
    gradient = jax.grad(loss, (0, 1, 2), allow_int=True)
    plan = gspmd.plan(
        gradient, *args, mesh="stage=2,data=2", in_specs=specs, rules=rules_of("data")
    )
    one = rows // 2 * dim * 4
    permute = ("collective_permute", m + p - 1, one)
    # Outward, those of the results; back, in one, those of the gradients by x and by the sides.
    sums = ("all_reduce", 1, m * one), ("all_reduce", 1, 2 * m * one)
    assert sorted(crossing(plan)) == sorted([permute, permute, *sums])
    close(plan.simulate(*args), gradient(*args))


# --------------------------------------------------------------------------------- manual regions


def test_a_region_by_hand_in_a_stage_and_a_pipeline_in_a_region() -> None:
    """Manual over "seq", automatic over "stage" and "data"; and the other way round."""
    mesh = jax.make_mesh((2, 2, 2), ("stage", "data", "seq"), (AxisType.Auto,) * 3)
    dim, rows, m = 8, 4, 3
    split = P("data", P.UNCONSTRAINED, None)

    def neighbours(x: jax.Array) -> jax.Array:
        return x + lax.ppermute(x, "seq", [(0, 1), (1, 0)])

    def inside(w: jax.Array, x: jax.Array) -> jax.Array:
        by_hand = jax.shard_map(
            neighbours, mesh=mesh, in_specs=P(None, "seq"), out_specs=P(None, "seq"),
            axis_names={"seq"},
        )  # fmt: skip
        stage = lambda w, x: jnp.tanh(by_hand(annotate(x, split)) @ w)  # noqa: E731
        return gspmd.pipeline(stage, w, x, stages=2)

    def around(w: jax.Array, x: jax.Array) -> jax.Array:
        stage = lambda w, x: jnp.tanh(neighbours(annotate(x, split)) @ w)  # noqa: E731
        by_hand = lambda w, x: gspmd.pipeline(stage, w, x, stages=2)  # noqa: E731
        spec = P(None, None, "seq")
        return jax.shard_map(
            by_hand, mesh=mesh, in_specs=(P(), spec), out_specs=spec, axis_names={"seq"}
        )(w, x)

    def plain(w: jax.Array, x: jax.Array) -> jax.Array:
        for i in range(2):
            x = jnp.tanh((x + jnp.roll(x, x.shape[2] // 2, axis=2)) @ w[i])
        return x

    w, x = array(2, dim, dim), array(m, rows, 6, dim, seed=1)
    expected = loss_of(plain)(w, x)
    for fn in (inside, around):
        plan = gspmd.plan(
            loss_of(fn), w, x, mesh=mesh, in_specs=(P("stage"), P(None, "data", "seq"))
        )
        one = rows // 2 * 3 * dim * 4
        for axis in ("seq", "stage"):
            permutes = [x for x in crossing(plan, axis) if x[0] == "collective_permute"]
            assert permutes == [("collective_permute", m + 1, one)] * 2
        close(plan.simulate(w, x), expected)


# ---------------------------------------------------------------------------------------- bad input


def piped(w: Any = None, x: Any = None, fn: Any = None, **options: Any) -> Any:
    w = array(2, 8, 8) if w is None else w
    x = array(4, 3, 8) if x is None else x
    fn = fn or (lambda w, x, *more: (jnp.tanh(x @ w), *more) if more else jnp.tanh(x @ w))
    return gspmd.pipeline(fn, w, x, **{"stages": 2, **options})


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "stages": (
        lambda: piped(array(3, 8, 8)),
        r"^stage_params has 3 entries in dim 0, but there are 2 stages: give one for each; "
        r"gspmd.stack_stages deals out layers to stages\.$",
    ),
    "rounds": (
        lambda: piped(array(2, 3, 8, 8), schedule="circular", repeats=4),
        r"^stage_params has 3 entries in dim 1, but there are 4 repeats: give one for each; ",
    ),
    "no dim of rounds": (
        lambda: piped(array(2), schedule="circular", repeats=4),
        r"^stage_params has shape \(2,\): it needs a dim 1\.$",
    ),
    "parameters that differ": (
        lambda: piped({"a": array(2, 8), "b": array(3, 8)}),
        r"^stage_params\['a'\] has 2 entries in dim 0, stage_params\['b'\] has 3; they must be ",
    ),
    "sides": (
        lambda: piped(sides=array(3, 8)),
        r"^sides has 3 entries in dim 0, but there are 4 microbatches: give one for each\.$",
    ),
    "cache": (
        lambda: piped(cache=array(2, 3, 8)),
        r"^cache has 3 entries in dim 1, but there are 4 microbatches: give one for each\.$",
    ),
    "state": (
        lambda: piped(state=array(3, 8)),
        r"^state has 3 entries in dim 0, but there are 2 stages: give one for each; ",
    ),
    "no microbatch": (
        lambda: piped(x=array(0, 3, 8)),
        r"^microbatches holds none: give arrays with an entry for each\.$",
    ),
    "nothing at all": (
        lambda: piped(x={}),
        r"^microbatches holds none: give arrays with an entry for each\.$",
    ),
    "another shape": (
        lambda: piped(fn=lambda w, x: (x @ w)[:, :5]),
        r"^stage_fn returns float32\[3, 5\] for its input of float32\[3, 8\]; every stage's output "
        r"is another's input\. Put what changes the shape, such as embedding and softmax, before ",
    ),
    "another dtype": (
        lambda: piped(fn=lambda w, x: (x @ w).astype(jnp.bfloat16)),
        r"^stage_fn returns bfloat16\[3, 8\] for its input of float32\[3, 8\]; ",
    ),
    "another structure": (
        lambda: piped(fn=lambda w, x: {"y": x}),
        r"^stage_fn returns PyTreeDef\(\{'y': \*\}\) for its input of structure PyTreeDef\(\*\); ",
    ),
    "no state": (
        lambda: piped(fn=lambda w, x, s: x, state=array(2, 8)),
        r"^stage_fn must return \(y, state\), since the pipeline has a state\.$",
    ),
    "one of two": (
        lambda: piped(fn=lambda w, x, c, s: (x, c), state=array(2, 8), cache=array(2, 4, 8)),
        r"^stage_fn must return \(y, cache, state\), since the pipeline has a cache and a state\.$",
    ),
    "another state": (
        lambda: piped(fn=lambda w, x, s: (x, s[:3]), state=array(2, 8)),
        r"^stage_fn returns float32\[3\] for the state of float32\[8\]; ",
    ),
    "schedule": (
        lambda: piped(schedule="1f1b"),
        r"^schedule='1f1b': it is 'gpipe' or 'circular'\.$",
    ),
    "repeats of gpipe": (
        lambda: piped(repeats=2),
        r"^repeats=2 is for schedule='circular'; 'gpipe' goes round once\.$",
    ),
    "no stage": (lambda: piped(stages=0), r"^stages=0: it is a whole number, at least 1\.$"),
    "half a round": (
        lambda: piped(schedule="circular", repeats=1.5),
        r"^repeats=1.5: it is a whole number, at least 1\.$",
    ),
    "too few rows": (
        lambda: gspmd.to_microbatches({"x": array(3, 2)}, 4),
        r"^a batch of 3 rows does not go into 4 microbatches: ask for 1 to 3\.$",
    ),
    "rows that differ": (
        lambda: gspmd.to_microbatches([array(3, 2), array(4, 2)], 2),
        r"^batch\[0\] has 3 entries in dim 0, batch\[1\] has 4; they must be alike\.$",
    ),
    "other rows": (
        lambda: gspmd.from_microbatches(array(4, 2, 3), 9),
        r"^9 rows are not what microbatches of shape \(4, 2, 3\) were cut from: that begins with ",
    ),
    "no layer": (
        lambda: gspmd.stack_stages({}, 2),
        r"^layer_params holds no layer: give arrays with an entry for each\.$",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_said(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises(PipelineError, match=message) as raised:
        call()
    assert len(str(raised.value).splitlines()) == 1


def test_an_axis_that_the_mesh_lacks() -> None:
    message = r"annotate at \S+test_pipeline.py:\d+.* 'stage'.*data"
    with pytest.raises(gspmd.SpecError, match=message):
        gspmd.plan(lambda w, x: piped(w, x), array(2, 8, 8), array(4, 3, 8), mesh="data=2")


@pytest.mark.parametrize(
    ("p", "m", "v", "found"),
    [
        (4, 3, 1, "3 microbatches for 4 stages: each stage works in 3 of 6 ticks, and 50 % is"),
        (4, 2, 2, "2 microbatches for 4 stages: each stage works in 4 of 9 ticks, and 56 % is"),
        (4, 4, 1, ""),
    ],
)
def test_a_bubble_that_could_be_smaller_is_a_finding(p: int, m: int, v: int, found: str) -> None:
    w = array(p, v, 8, 8) if v > 1 else array(p, 8, 8)
    fn = lambda w, x: piped(w, x, stages=p, schedule=SCHEDULES[v], repeats=v)  # noqa: E731
    plan = gspmd.plan(fn, w, array(m, 3, 8), mesh={"stage": p})
    assert [finding.code for finding in plan.findings] == ["pipeline-bubble"] * bool(found)
    assert all(found in finding.message for finding in plan.findings)
