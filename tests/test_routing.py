"""Routers: the golden case, a slow reference, the laws that hold for each, and their plans."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gspmd import P
from gspmd.models.routing import (
    ROUTERS,
    ExpertChoice,
    Router,
    Routing,
    RoutingError,
    Top2,
    TopK,
    combine,
    dispatch,
    load_probability,
    spread,
)
from gspmd.testing import assert_equivalent

# Six tokens, three experts; two places each.
GATES_GSE = jnp.array(
    [
        [
            [0.6, 0.3, 0.1],
            [0.55, 0.15, 0.3],
            [0.2, 0.7, 0.1],
            [0.8, 0.15, 0.05],
            [0.5, 0.1, 0.4],
            [0.25, 0.35, 0.40],
        ]
    ]
)
TWO = {"capacity_factor": 1.0, "multiple": 1}  # two places in the golden case
VANILLA = {(0, 0): 0.6, (0, 1): 0.3, (1, 0): 0.55, (1, 2): 0.3, (2, 1): 0.7, (5, 2): 0.4}


@functools.partial(jax.jit, static_argnums=0)
def route(
    router: Router,
    logits_GSE: jax.Array,
    key: jax.Array | None = None,
    mask_GS: jax.Array | None = None,
) -> Routing:
    return router.route(logits_GSE, key, mask_GS)


def weights(routing: Routing) -> dict[tuple[int, int], float]:
    """(token, expert) -> weight, of what is dispatched in the first group."""
    sent_SE = np.asarray(routing.dispatch_GSEC[0].any(-1))
    weight_SE = np.asarray(routing.combine_GSEC[0].sum(-1))
    return {(int(s), int(e)): float(weight_SE[s, e]) for s, e in np.argwhere(sent_SE)}


# ---------------------------------------------------------------------------------- golden values

PRIORITY = {(0, 0): 0.6, (1, 2): 0.3, (2, 1): 0.7, (3, 0): 0.8, (3, 1): 0.15, (5, 2): 0.4}
HALVES = {(0, 0): 2 / 3, (0, 1): 1 / 3, (1, 0): 0.55 / 0.85, (1, 2): 0.3 / 0.85}


@pytest.mark.parametrize(
    ("router", "expected"),
    [
        (TopK(2, 0.5, multiple=1), VANILLA),
        (TopK(2, 0.5, multiple=1, batch_priority=True), PRIORITY),
        (Top2(**TWO), HALVES | {(2, 1): 0.7 / 0.9, (5, 2): 0.4 / 0.75}),
        (Top2(**TWO, legacy=False), HALVES | {(2, 1): 1.0, (5, 2): 1.0}),
        (TopK(2, 0.5, multiple=1, renormalize=True), HALVES | {(2, 1): 7 / 9, (5, 2): 8 / 15}),
        (TopK(1, 1.0, multiple=1), {(0, 0): 0.6, (1, 0): 0.55, (2, 1): 0.7, (5, 2): 0.4}),
        (
            ExpertChoice(1.0),
            {(3, 0): 0.8, (0, 0): 0.6, (2, 1): 0.7, (5, 1): 0.35, (4, 2): 0.4, (5, 2): 0.4},
        ),
    ],
    ids=["vmoe", "priority", "gshard", "renormalized after", "renormalized", "top1", "choice"],
)
def test_the_golden_case(router: Router, expected: dict[tuple[int, int], float]):
    assert weights(route(router, jnp.log(GATES_GSE))) == pytest.approx(expected, rel=1e-5)


def test_the_losses_of_the_golden_case():
    logits_GSE = jnp.log(GATES_GSE)
    assert float(route(Top2(**TWO), logits_GSE).losses["balance"]) == pytest.approx(1.225)
    losses = route(TopK(2, 0.5), logits_GSE).losses
    assert float(losses["importance"]) == pytest.approx(0.107917, abs=1e-6)
    for k, expected in ((1, 0.227107), (2, 0.153799)):
        least_GS1 = jnp.sort(logits_GSE, axis=-1)[..., -k, None]
        load = spread(load_probability(logits_GSE, least_GS1, 1 / 3))
        assert float(load) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("router", "tokens", "experts", "places"),
    [
        (Top2(), 1024, 64, 32),
        (Top2(), 1024, 2048, 4),  # int(1.0) = 1, rounded up
        (Top2(), 1024, 4096, 4),  # int(0.5) = 0: one at least
        (Top2(1.25, multiple=1), 100, 8, 15),  # int(15.6)
        (TopK(2, 1.05), 8 * 197, 32, 104),  # V-MoE's B/16: ceil(103.4)
        (TopK(1, 1.25, multiple=1), 100, 8, 16),
        (ExpertChoice(2.0), 1024, 64, 32),
        (ExpertChoice(2.0), 4, 64, 1),
        (ExpertChoice(8.0), 4, 2, 4),  # all tokens
    ],
)
def test_capacity(router: Router, tokens: int, experts: int, places: int):
    assert router.capacity(tokens, experts) == places


# -------------------------------------------------------------------------------- slow reference

G, S, E = 2, 7, 4


def drawn_logits(seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(G, S, E)) * 2, jnp.float32)


def drawn_mask(seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).random((G, S)) < 0.7)


def slow(router: TopK | Top2, gates: np.ndarray, mask: np.ndarray) -> set[tuple[int, int, int]]:
    """(token, expert, place) in one group, found token by token."""
    k = router.k if isinstance(router, TopK) else 2
    tokens = list(range(len(gates)))
    if isinstance(router, TopK) and router.batch_priority:
        tokens.sort(key=lambda s: -gates[s].max() * mask[s])
    queues: dict[int, int] = dict.fromkeys(range(gates.shape[1]), 0)
    taken: set[tuple[int, int, int]] = set()
    for choice in range(k):
        for s in tokens:
            if mask[s]:
                e = int(np.argsort(-gates[s], kind="stable")[choice])
                if queues[e] < router.capacity(*gates.shape):
                    taken.add((s, e, queues[e]))
                queues[e] += 1
    return taken


TOKEN_CHOICE = [
    Top2(0.9, multiple=1),
    Top2(1.5, multiple=1, legacy=False),
    TopK(1, 1.0, multiple=1),
    TopK(2, 0.6, multiple=1),
    TopK(3, 0.6, multiple=1, batch_priority=True),
    TopK(2, 0.3, multiple=2, batch_priority=True, renormalize=True),
]
seeds = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("router", TOKEN_CHOICE, ids=str)
@given(seed=seeds, masked=st.booleans())
@settings(max_examples=15)
def test_tokens_are_placed_as_a_loop_over_them_would(router: TopK | Top2, seed: int, masked: bool):
    logits_GSE = drawn_logits(seed)
    mask_GS = drawn_mask(seed + 1) if masked else jnp.ones((G, S), bool)
    routing = route(router, logits_GSE, None, mask_GS)
    gates, mask = np.asarray(jax.nn.softmax(logits_GSE, axis=-1)), np.asarray(mask_GS)
    for g in range(G):
        found = {tuple(map(int, at)) for at in np.argwhere(np.asarray(routing.dispatch_GSEC[g]))}
        assert found == slow(router, gates[g], mask[g])


# ------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("router", [*TOKEN_CHOICE, ExpertChoice(1.2)], ids=str)
@given(seed=seeds)
@settings(max_examples=15)
def test_places_are_used_once_and_tokens_go_to_as_many_experts_as_they_may(
    router: Router, seed: int
):
    mask_GS = drawn_mask(seed + 1)
    routing = route(router, drawn_logits(seed), None, mask_GS)
    sent_GSEC = np.asarray(routing.dispatch_GSEC)
    assert routing.combine_GSEC.shape == (G, S, E, router.capacity(S, E))
    assert sent_GSEC.sum(axis=1).max() <= 1
    assert not sent_GSEC[~np.asarray(mask_GS)].any()
    np.testing.assert_array_equal(sent_GSEC, np.asarray(routing.combine_GSEC) != 0)
    if isinstance(router, ExpertChoice):
        full = route(router, drawn_logits(seed)).dispatch_GSEC
        assert np.asarray(full).sum(axis=1).all()
    else:
        assert sent_GSEC.any(-1).sum(axis=-1).max() <= router.experts_per_token


@given(seed=seeds)
@settings(max_examples=15)
def test_gshard_and_vmoe_place_alike(seed: int):
    logits_GSE = drawn_logits(seed)
    gshard = route(Top2(1.2, multiple=1), logits_GSE)  # int(2.1) = ceil(7 * 2 * 0.5 / 4 = 1.75)
    vmoe = route(TopK(2, 0.5, multiple=1), logits_GSE)
    np.testing.assert_array_equal(gshard.dispatch_GSEC, vmoe.dispatch_GSEC)


@given(seed=seeds)
@settings(max_examples=15)
def test_first_choices_are_never_displaced_by_second_ones(seed: int):
    logits_GSE = drawn_logits(seed)
    second = np.asarray(route(Top2(1.2, multiple=1), logits_GSE).dispatch_GSEC)
    first = np.asarray(route(TopK(1, 1.0, multiple=1), logits_GSE).dispatch_GSEC)
    assert Top2(1.2, multiple=1).capacity(S, E) == TopK(1, 1.0, multiple=1).capacity(S, E)
    assert second[first].all()


@given(seed=seeds)
@settings(max_examples=10)
def test_with_places_for_all_nothing_is_lost(seed: int):
    logits_GSE = drawn_logits(seed)
    gate_GSE = np.sort(jax.nn.softmax(logits_GSE, axis=-1), axis=-1)
    for router, mass_GS in (
        (Top2(E * 1.0), np.ones((G, S))),
        (Top2(E * 1.0, legacy=False), np.ones((G, S))),
        (TopK(2, E / 2), gate_GSE[..., -2:].sum(-1)),
        (TopK(2, E / 2, renormalize=True), np.ones((G, S))),
        (ExpertChoice(E * 1.0), np.ones((G, S))),
    ):
        kept_GS = np.asarray(route(router, logits_GSE).combine_GSEC).sum(axis=(2, 3))
        np.testing.assert_allclose(kept_GS, mass_GS, rtol=1e-5)
    plain = route(TopK(2, E / 2), logits_GSE)
    priority = route(TopK(2, E / 2, batch_priority=True), logits_GSE)
    np.testing.assert_array_equal(
        plain.combine_GSEC.sum(axis=-1), priority.combine_GSEC.sum(axis=-1)
    )


@given(seed=seeds)
@settings(max_examples=10)
def test_a_dropped_choice_takes_its_share_along_in_legacy_mode_only(seed: int):
    logits_GSE = drawn_logits(seed)
    legacy, after = (
        np.asarray(route(Top2(0.9, multiple=1, legacy=x), logits_GSE).combine_GSEC)
        for x in (True, False)
    )
    count_GS = (after != 0).sum(axis=(2, 3))
    sums_GS = legacy.sum(axis=(2, 3))
    np.testing.assert_allclose(after.sum(axis=(2, 3)), count_GS > 0, rtol=1e-5)
    np.testing.assert_allclose(sums_GS[count_GS == 2], 1, rtol=1e-5)
    assert (sums_GS[count_GS < 2] < 1).all()


@pytest.mark.parametrize("router", [TOKEN_CHOICE[0], TOKEN_CHOICE[4], ExpertChoice(1.2)], ids=str)
def test_groups_do_not_see_each_other(router: Router):
    logits_GSE = drawn_logits(0)
    other = logits_GSE.at[1].add(jax.random.normal(jax.random.key(0), (S, E)))
    before, after = route(router, logits_GSE), route(router, other)
    np.testing.assert_array_equal(before.combine_GSEC[0], after.combine_GSEC[0])


@pytest.mark.parametrize("router", [TOKEN_CHOICE[3], TOKEN_CHOICE[4], ExpertChoice(1.2)], ids=str)
def test_the_order_of_the_tokens_matters_only_where_it_decides(router: Router):
    def sent(logits_GSE: jax.Array) -> np.ndarray:
        return np.asarray(route(router, logits_GSE).combine_GSEC.sum(axis=-1))

    def moves(seed: int) -> bool:
        logits_GSE = drawn_logits(seed)
        order = np.random.default_rng(seed).permutation(S)
        return not np.allclose(sent(logits_GSE[:, order]), sent(logits_GSE)[:, order])

    moved = [moves(seed) for seed in range(8)]
    by_order = isinstance(router, TopK) and not router.batch_priority
    assert any(moved) == by_order


def test_padding_counts_in_no_loss():
    """Losses of a group with padding are those of the group without."""
    logits_GSE = drawn_logits(3)
    mask_GS = jnp.arange(S) < jnp.array([[S - 2]] * G)
    for router in (Top2(), dataclasses.replace(TopK(), balance=0.1)):
        padded = route(router, logits_GSE, None, mask_GS).losses
        alone = route(router, logits_GSE[:, : S - 2]).losses
        for name in alone:
            assert float(padded[name]) == pytest.approx(float(alone[name]), rel=1e-5), name


def test_losses_at_even_load_and_when_one_expert_has_all():
    even = jnp.tile(20 * jnp.eye(E), (G, 1, 1))  # each token another expert
    one = jnp.zeros((G, S, E)).at[..., 1].set(50.0)
    router = dataclasses.replace(TopK(1), balance=1.0)
    for logits_GSE, balance, importance in ((even, 1.0, 0.0), (one, E, E - 1)):
        for losses in (route(Top2(), logits_GSE).losses, route(router, logits_GSE).losses):
            assert float(losses["balance"]) == pytest.approx(balance, rel=1e-5)
        assert float(losses["importance"]) == pytest.approx(importance, abs=1e-5)
    uniform = spread(load_probability(jnp.zeros((G, S, E)), jnp.zeros((G, S, 1)), 1 / E))
    assert float(uniform) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ROUTERS)
def test_gradients_reach_the_router(name: str):
    def value(logits_GSE: jax.Array) -> jax.Array:
        routing = ROUTERS[name].route(logits_GSE)
        return routing.loss + jnp.sum(routing.combine_GSEC * jnp.arange(E)[:, None])

    gradient = jax.jit(jax.grad(value))(drawn_logits(0))
    assert bool(jnp.all(jnp.isfinite(gradient)))
    assert float(jnp.abs(gradient).max()) > 1e-3


def test_one_expert_is_the_dense_layer():
    x_GSM = jax.random.normal(jax.random.key(0), (G, S, 3))
    for router in (TopK(1, 1.0), ExpertChoice(1.0)):
        routing = route(router, jnp.zeros((G, S, 1)))
        y_GSM = combine(routing, jnp.tanh(dispatch(routing, x_GSM)))
        np.testing.assert_allclose(y_GSM, jnp.tanh(x_GSM), rtol=1e-6)


@pytest.mark.parametrize("router", [TOKEN_CHOICE[0], TOKEN_CHOICE[4]], ids=str)
def test_products_dispatch_as_indices_do(router: Router):
    """Each token taken by index to its experts one by one: equal outputs and gradients."""
    M = 5
    x_GSM = jax.random.normal(jax.random.key(0), (G, S, M))
    w_ME, up_EMM = (
        jax.random.normal(jax.random.key(i), s) for i, s in ((1, (M, E)), (2, (E, M, M)))
    )

    def by_products(x_GSM: jax.Array, w_ME: jax.Array, up_EMM: jax.Array) -> jax.Array:
        routing = router.route(x_GSM @ w_ME)
        sent_EGCM = dispatch(routing, x_GSM)
        return combine(routing, jnp.tanh(jnp.einsum("EGCM,EMN->EGCN", sent_EGCM, up_EMM)))

    g, s, e, c = np.nonzero(np.asarray(route(router, x_GSM @ w_ME).dispatch_GSEC))

    def by_indices(x_GSM: jax.Array, w_ME: jax.Array, up_EMM: jax.Array) -> jax.Array:
        weight = router.route(x_GSM @ w_ME).combine_GSEC[g, s, e, c]
        y = jnp.tanh(jnp.einsum("iM,iMN->iN", x_GSM[g, s], up_EMM[e]))
        return jnp.zeros_like(x_GSM).at[g, s].add(weight[:, None] * y)

    def gradients(fn):
        total = lambda *args: jnp.sum(jnp.sin(fn(*args)))  # noqa: E731
        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(x_GSM, w_ME, up_EMM)

    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        gradients(by_products),
        gradients(by_indices),
    )


def test_a_gate_that_underflows_is_not_dispatched():
    logits_GSE = jnp.zeros((1, 1, 3)).at[..., 0].set(200.0)
    assert weights(route(Top2(4.0), logits_GSE)) == {(0, 0): 1.0}


# ------------------------------------------------------------------------------- what keys draw

MANY = 4000


def second_choices(router: Top2, logits_E: list[float]) -> np.ndarray:
    """How often each expert is the second choice of tokens with these logits; the last: none."""
    logits_GSE = jnp.tile(jnp.asarray(logits_E), (MANY, 1, 1))
    routing = route(router, logits_GSE, jax.random.key(0))
    sent_GE = np.asarray(routing.dispatch_GSEC).any(axis=(1, 3))
    seconds_G = np.where(sent_GE[:, 1:].any(-1), sent_GE[:, 1:].argmax(-1), len(logits_E) - 1)
    return np.bincount(seconds_G, minlength=len(logits_E)) / MANY


def test_second_choices_are_sampled_by_their_gates_or_kept_by_chance():
    gates = [0.7, 0.2, 0.1]  # of which the last two are left
    logits = [float(np.log(g)) for g in gates]
    room = {"capacity_factor": 3.0}
    sampled = second_choices(Top2(second="sampling", **room), logits)
    np.testing.assert_allclose(sampled, [2 / 3, 1 / 3, 0], atol=0.03)
    by_chance = second_choices(Top2(second="random", threshold=0.5, **room), logits)
    np.testing.assert_allclose(by_chance, [0.4, 0, 0.6], atol=0.03)
    always = second_choices(Top2(second="all", **room), logits)
    np.testing.assert_array_equal(always, [1, 0, 0])


def test_noise_has_the_deviation_of_one_over_experts_and_is_drawn_with_a_key_only():
    router = TopK(1, E * 1.0)
    logits_GSE = jnp.zeros((MANY, 1, E)).at[..., 0].set(1 / E)  # one deviation above the others
    quiet, noisy = route(router, logits_GSE), route(router, logits_GSE, jax.random.key(0))
    assert set(quiet.losses) == {"importance", "balance"}
    assert set(noisy.losses) == {"importance", "balance", "load"}
    share = float(noisy.dispatch_GSEC[:, 0, 0].any(-1).mean())
    normal = np.random.default_rng(0).normal(size=(100_000, E)) + np.array([1, 0, 0, 0])
    assert share == pytest.approx((normal.argmax(-1) == 0).mean(), abs=0.03)
    # What is measured without noise, importance, is a function of the logits alone.
    assert float(quiet.losses["importance"]) == float(noisy.losses["importance"])


def test_the_load_loss_is_the_share_of_draws_in_which_an_expert_is_taken():
    logits_E, sigma = jnp.array([0.5, 0.2, 0.0, -0.4]), 1 / E
    draws = np.random.default_rng(0).normal(size=200_000) * sigma
    least = 0.3
    expected = [(float(x) + draws > least).mean() for x in logits_E]
    found = load_probability(logits_E, jnp.asarray(least), sigma)
    np.testing.assert_allclose(found, expected, atol=5e-3)


# ----------------------------------------------------------------------------------------- misuse


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Top2(capacity_factor=0), r"capacity_factor=0: experts with no places take no"),
        (lambda: TopK(capacity_factor=-1.0), r"capacity_factor=-1.0: .* give more than 0"),
        (lambda: ExpertChoice(0), r"capacity_factor=0: "),
        (lambda: Top2(multiple=0), r"multiple=0: capacities are multiples of 1 or more"),
        (lambda: TopK(k=0), r"k=0: a token goes to one expert at least"),
        (lambda: Top2(second="none"), r"second='none': it is 'all', 'sampling' or 'random'"),
        (
            lambda: TopK(k=3).route(jnp.zeros((1, 4, 2))),
            r"k=3 experts for each token, but there are 2; lower k",
        ),
    ],
)
def test_what_cannot_be_routed_is_refused(make, message: str):
    with pytest.raises(RoutingError, match=message):
        make()


# ------------------------------------------------------------------------------------ partitioned


def decisions(router: Router, x_GSM: jax.Array, w_ME: jax.Array):
    """Who goes where, exactly, and the layer with linear experts."""
    routing = router.route(jnp.einsum("GSM,ME->GSE", x_GSM, w_ME))
    sent_EGCM = dispatch(routing, x_GSM)
    scale_E = 1 + jnp.arange(w_ME.shape[1], dtype=jnp.float32)
    y_GSM = combine(routing, sent_EGCM * scale_E[:, None, None, None])
    return routing.dispatch_GSEC, y_GSM, routing.loss


PARTITIONED = {
    "top2": Top2(1.0, multiple=1),
    "vmoe": TopK(2, 0.6),
    "priority": TopK(2, 0.4, multiple=1, batch_priority=True, balance=1.0),
    "choice": ExpertChoice(1.0),
}
FAST = ("top2", "x=4"), ("priority", "x=3,y=2")


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        pytest.param(name, mesh, marks=() if (name, mesh) in FAST else pytest.mark.exhaustive)
        for name in PARTITIONED
        for mesh in ("x=4", "x=3,y=2", "x=1,y=2")
    ],
)
def test_partitioned_routers_decide_alike(name: str, mesh: str):
    axis = "y" if "y" in mesh else None
    x_GSM = jax.random.normal(jax.random.key(0), (4, 6, 8))
    w_ME = jax.random.normal(jax.random.key(1), (8, 4))
    assert_equivalent(
        functools.partial(decisions, PARTITIONED[name]),
        x_GSM,
        w_ME,
        mesh=mesh,
        in_specs=(P("x", None, axis), P(axis)),
    )
