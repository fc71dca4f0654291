"""A pipeline computes what its stages compute in sequence."""

import functools
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pipelines import (
    SCHEDULES,
    array,
    close,
    layers,
    mlp,
    model,
    run_in_sequence,
)

import gspmd
from gspmd import P
from gspmd.bubble import Ticks

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


@pytest.mark.parametrize(
    ("stage", "turn"),
    [
        (lambda w, x: jnp.sin(x @ w), 1 + 0.5j),
        (lambda w, x: jnp.fft.irfft(jnp.fft.rfft(x @ w) * x.sum()), 1),
    ],
)
def test_complex_numbers_have_a_gradient(stage: Callable[..., Any], turn: complex) -> None:
    """In what goes from stage to stage, and within a stage, which JAX keeps by no policy."""
    w, xs = turn * array(2, 4, 4), turn * array(3, 2, 4, seed=1)
    piped = lambda w, xs: gspmd.pipeline(stage, w, xs, stages=2)  # noqa: E731
    plain = lambda w, xs: sequence(stage, w, xs, None, None, None, 1)  # noqa: E731
    grads = [
        jax.jit(jax.grad(lambda w, xs, fn=fn: jnp.sum(jnp.abs(fn(w, xs))), (0, 1)))
        for fn in (piped, plain)
    ]
    close(*(grad(w, xs) for grad in grads))


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


@pytest.mark.parametrize("enclosed", [False, True])
def test_nan_in_the_place_of_a_layer_reaches_nothing(enclosed: bool) -> None:
    """The layer that is run again, in vain, is NaN, and so is its gradient by all that it sees."""
    w, xs = jnp.asarray([[1.0], [1.0], [0.9]]), jnp.full((2, 2, 1), 9.0)

    def loss(piped: bool, w: jax.Array, xs: jax.Array, shift: jax.Array) -> jax.Array:
        def layer(w: jax.Array, x: jax.Array, side: jax.Array) -> jax.Array:
            return jnp.sqrt(x - w - (shift if enclosed else side))

        if piped:
            params = gspmd.stack_stages(w, 2)
            sides = jnp.broadcast_to(shift, (2,))
            stage = gspmd.run_layers(layer)
            return jnp.sum(gspmd.pipeline(stage, params, xs, stages=2, sides=sides))
        return jnp.sum(run_in_sequence(lambda w, x: layer(w, x, shift), w, xs))

    grads = [jax.grad(functools.partial(loss, p), (0, 1, 2)) for p in (True, False)]
    close(*(jax.jit(fn)(w, xs, jnp.zeros(())) for fn in grads))


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
