"""Ring attention, by hand over one axis of a partitioned program, is plain attention."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import gspmd
from examples.ring_attention import attention, ring_attention
from gspmd import P

BATCH, HEADS, DIM = 3, 4, 8
RULES = {"heads": "model"}


def draw(tokens: int) -> tuple[np.ndarray, ...]:
    shape = (3, BATCH, tokens, HEADS, DIM)
    return tuple(np.random.default_rng(0).normal(size=shape).astype(np.float32))


def lengths(tokens: int) -> np.ndarray:
    """Of the rows: a full one, one of a single token, and one that ends within a block."""
    return np.asarray([tokens, 1, max(1, 2 * tokens // 3)])


def with_gradient(fn: Callable[..., Any], causal: bool) -> Callable[..., Any]:
    """What each real token gathers, and the gradients of a weighted sum of that."""

    def loss(q: Any, k: Any, v: Any, length: Any) -> Any:
        y = fn(q, k, v, length, causal)
        real = jnp.arange(q.shape[1])[:, None, None] < length[:, None, None, None]
        return jnp.sum(jnp.where(real, jnp.sin(y), 0)), jnp.where(real, y, 0)

    return jax.grad(loss, (0, 1, 2), has_aux=True)


def close(found: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


CASES = [(12, True, 4, 2), (13, True, 4, 2), (7, False, 3, 1)]
MORE = [(t, causal, n, 2) for t in (1, 5, 8, 17) for causal in (True, False) for n in (1, 2, 4)]


@pytest.mark.parametrize(
    ("tokens", "causal", "ring", "heads"),
    CASES + [pytest.param(*case, marks=pytest.mark.exhaustive) for case in MORE],
)
def test_it_is_exact(tokens: int, causal: bool, ring: int, heads: int) -> None:
    """Forward and gradient, also where the tokens do not come out even on the ring."""
    mesh = {"seq": ring, "model": heads}
    args = (*draw(tokens), lengths(tokens))
    plan = gspmd.plan(with_gradient(ring_attention, causal), *args, mesh=mesh, rules=RULES)
    close(plan.simulate(*args), jax.jit(with_gradient(attention, causal))(*args))


@pytest.mark.parametrize("causal", [True, False])
def test_a_row_of_no_token_gathers_what_plain_attention_does(causal: bool) -> None:
    """The mean of all tokens, which has no part of those that pad them."""
    tokens, mesh = 7, {"seq": 4, "model": 2}
    args = (*draw(tokens), np.asarray([tokens, 0, 3]))
    plan = gspmd.plan(
        functools.partial(ring_attention, causal=causal), *args, mesh=mesh, rules=RULES
    )
    close(plan.simulate(*args), jax.jit(functools.partial(attention, causal=causal))(*args))


def test_it_works_in_half_precision_and_without_its_axis() -> None:
    args = (*draw(7), lengths(7))
    half = (*(x.astype(np.float16) for x in args[:3]), args[3])
    made = gspmd.plan(ring_attention, *half, mesh={"seq": 4}, rules={"heads": None}).simulate(*half)
    assert made.dtype == np.float16
    expected = attention(*args)
    np.testing.assert_allclose(made, expected, atol=2e-3 * np.abs(expected).max())
    plan = gspmd.plan(ring_attention, *args, mesh={"model": 2}, rules=RULES)
    close(plan.simulate(*args), expected)


def test_it_runs_on_devices_beside_annotations() -> None:
    """Manual over "seq", automatic over "data" and "model", in a layer that knows of neither."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "seq", "model"), (AxisType.Auto,) * 3)
    tokens, length = 10, np.asarray([10, 4])
    x = np.random.default_rng(1).normal(size=(2, tokens, 16)).astype(np.float32)
    w = np.random.default_rng(2).normal(size=(4, 16, HEADS, DIM), scale=0.2).astype(np.float32)

    def layer(attend: Callable[..., Any], w: Any, x: Any) -> Any:
        x = gspmd.annotate(x, P("batch", "seq", None))
        q, k, v = jnp.einsum("bsm,cmnd->cbsnd", x, w[:3])
        return jnp.mean(jnp.sin(jnp.einsum("bsnd,mnd->bsm", attend(q, k, v, length), w[3])))

    def step(attend: Callable[..., Any]) -> Callable[..., Any]:
        return jax.value_and_grad(functools.partial(layer, attend), (0, 1))

    rules = {**RULES, "batch": "data"}
    fn = gspmd.partition(
        step(ring_attention),
        mesh,
        in_specs=(P(None, None, "heads"), P("batch", "seq")),
        rules=rules,
    )
    close(fn(w, x), jax.jit(step(attention))(w, x))
    over = {(c.kind, c.axes) for c in fn.plan(w, x).collectives if c.trips > 1 or "seq" in c.axes}
    assert ("collective_permute", ("seq",)) in over
    assert not any(kind in ("all_gather", "all_to_all") for kind, _ in over)


def test_only_a_block_of_keys_and_values_goes_round() -> None:
    """In n - 1 turns, forward and backward; the heads are split, as annotated."""
    ring, tokens = 4, 16
    loss = lambda q, k, v: jnp.sum(ring_attention(q, k, v, np.full(BATCH, tokens)) ** 2)  # noqa: E731
    args = draw(tokens)
    block = BATCH * tokens // ring * (HEADS // 2) * DIM * 4
    for fn, turns in ((loss, 1), (jax.grad(loss, (0, 1, 2)), 2)):
        plan = gspmd.plan(fn, *args, mesh={"seq": ring, "model": 2}, rules=RULES)
        sent = [(c.kind, c.trips, c.bytes) for c in plan.collectives if c.bytes > 4]
        assert sent == [("collective_permute", ring - 1, block)] * 2 * turns
        largest = max(np.prod(x.shape) for op, _ in plan.program.walk() for x in op.outs)
        assert largest < BATCH * HEADS // 2 * tokens**2  # no score for each pair of tokens


def test_a_pipeline_of_ring_attention() -> None:
    """Three ways of splitting nest: stages, by hand over the sequence, and heads."""
    tokens, stages, micro = 64, 2, 3
    mesh = {"stage": stages, "seq": 2, "model": 2}
    w = np.random.default_rng(2).normal(size=(stages, 4, 16, HEADS, DIM), scale=0.2)
    x = np.random.default_rng(1).normal(size=(micro, 2, tokens, 16))
    w, x = w.astype(np.float32), x.astype(np.float32)

    def stage(attend: Callable[..., Any], w: Any, x: Any) -> Any:
        q, k, v = jnp.einsum("bsm,cmnd->cbsnd", x, w[:3])
        y = attend(q, k, v, np.asarray([tokens, 40]))
        return x + jnp.einsum("bsnd,mnd->bsm", y, w[3])

    def piped(w: Any, x: Any) -> Any:
        by_ring = functools.partial(stage, ring_attention)
        return jnp.mean(jnp.sin(gspmd.pipeline(by_ring, w, x, stages=stages)))

    def plain(w: Any, x: Any) -> Any:
        for s in range(stages):
            x = jax.vmap(functools.partial(stage, attention, w[s]))(x)
        return jnp.mean(jnp.sin(x))

    plan = gspmd.plan(
        jax.value_and_grad(piped, (0, 1)), w, x, mesh=mesh, rules=RULES,
        in_specs=(P("stage", None, None, "heads"), P(None, None, "seq")),
    )  # fmt: skip
    close(plan.simulate(w, x), jax.value_and_grad(plain, (0, 1))(w, x))
    by_axis = {
        axis: {c.kind for c in plan.collectives if c.axes == (axis,) and c.trips > 1}
        for axis in ("stage", "seq")
    }
    assert by_axis == {"stage": {"collective_permute"}, "seq": {"collective_permute"}}
