"""Stretches of a dim travel between devices: who sends what, in how many rounds, at which price."""

import dataclasses
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import agrees, kinds
from jax import lax

import gspmd
from gspmd import P
from gspmd.exchange import Round, Runs, rounds

# --- rounds


def delivered(have: Runs, wants: tuple[Runs, ...], block: int, size: int) -> np.ndarray:
    """What each device holds after all rounds, by position; -1 where nothing arrived."""
    shards = np.full((have.group, block), -9)
    for i, (start, stop, at) in enumerate(zip(have.start, have.stop, have.at, strict=True)):
        shards[i, at : at + max(0, stop - start)] = np.arange(start, max(start, stop))
    out = np.full((have.group, size), -1)
    for move in rounds(have, wants, block):
        for sender, receiver in move.pairs or [(i, i) for i in range(have.group)]:
            piece = shards[sender, move.cut[sender] : move.cut[sender] + move.size]
            assert piece.size == move.size, "a cut past the end of the shard"
            for index in range(move.first[receiver], move.last[receiver]):
                out[receiver, index] = piece[index - move.put[receiver]]
    return out


def expected(have: Runs, wants: tuple[Runs, ...], size: int) -> np.ndarray:
    held = {p for a, b in zip(have.start, have.stop, strict=True) for p in range(a, b)}
    out = np.full((have.group, size), -1)
    for want in wants:
        for i, (start, stop, at) in enumerate(zip(want.start, want.stop, want.at, strict=True)):
            for p in range(start, stop):
                if p in held:
                    out[i, at + p - start] = p
    return out


@hypothesis.given(
    n=st.integers(1, 40), group=st.integers(1, 6), start=st.integers(-20, 20),
    slope=st.integers(-12, 12), size=st.integers(1, 15),
)  # fmt: skip
@hypothesis.settings(max_examples=300, deadline=None)
def test_every_device_gets_what_it_wants(
    n: int, group: int, start: int, slope: int, size: int
) -> None:
    have = Runs.blocks(n, group)
    first = start + slope * np.arange(group)
    want = Runs.of(first, first + size)
    block = -(-n // group)
    made = rounds(have, (want,), block)
    np.testing.assert_array_equal(
        delivered(have, (want,), block, size), expected(have, (want,), size)
    )
    for move in made:
        senders, receivers = zip(*move.pairs, strict=True) if move.pairs else ((), ())
        assert len(set(senders)) == len(senders)
        assert len(set(receivers)) == len(receivers)


def test_a_halo_takes_one_round_per_neighbour_whatever_the_group() -> None:
    for group in (4, 64, 512):
        have = Runs.blocks(8 * group, group)
        first = 8 * np.arange(group) - 2
        made = rounds(have, (Runs.of(first, first + 12),), 8)
        assert [(move.size, len(move.pairs)) for move in made] == [
            (8, 0), (2, group - 1), (2, group - 1)
        ]  # fmt: skip


def test_a_cyclic_shift_is_one_permutation() -> None:
    have = Runs.blocks(24, 4)
    start = np.asarray(have.start) + 3
    ahead, wrapped = Runs.of(start, start + 6), Runs.of(start - 24, start - 18)
    (own, moved) = rounds(have, (ahead, wrapped), 6)
    assert own.pairs == ()
    assert sorted(moved.pairs) == [(0, 3), (1, 0), (2, 1), (3, 2)]
    assert moved.size == 3


def test_who_gets_nothing_gets_an_empty_round() -> None:
    empty = Round.empty(2, 3)
    assert empty.pairs == ()
    assert empty.first == empty.last == (0, 0)


# --- strategies


@dataclasses.dataclass(frozen=True)
class Case:
    """A function with its operands, how they and the result are split, and what that may send."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    spec: P
    kinds: dict[str, int]
    bytes: float  # wire bytes per device
    mesh: str = "x=4"
    out: P | None = None  # as `spec`
    rest: tuple[P, ...] = ()  # the other operands' specs


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


LINE = np.arange(1, 25, dtype=np.float32)
ROWS = normal(23, 6)  # uneven
IMAGE = normal(2, 3, 23, 11)
KERNEL = normal(4, 3, 3, 3)
COMPLEX = (normal(3, 10, 9) + 1j * normal(3, 10, 9, seed=1)).astype(np.complex64)
STACK = np.resize(COMPLEX, (4, 12, 9))
X, H, HW = P("x"), P(None, None, "x"), P(None, None, "x", "y")
ROW = 4 * 2 * 3 * 11  # bytes of one row of IMAGE


def conv(**options: Any) -> Callable[..., Any]:
    options = {"window_strides": (1, 1), "padding": "SAME"} | options
    return lambda x, k: lax.conv_general_dilated(x, k, **options)


def convolved(fn: Callable[..., Any], *, spec: P = H, **expected: Any) -> Case:
    args = expected.pop("args", (IMAGE, KERNEL))
    return Case(fn, args, spec, rest=(P(),), **expected)


def square_of(fn: Callable[..., Any], argument: int = 0) -> Callable[..., Any]:
    return jax.grad(lambda *xs: (fn(*xs) ** 2).sum(), argnums=argument)


max_pool = lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 3, 2), (1, 1, 2, 2), "SAME")  # noqa: E731
sum_pool = lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 1, 3, 2), (1, 1, 2, 2), "VALID")  # noqa: E731
permutes = lambda n: {"collective_permute": n} if n else {}  # noqa: E731

STRETCHES = {
    "slice": Case(lambda x: x[3:17], (LINE,), X, permutes(2), 12),
    "slice of a few": Case(lambda x: x[3:5], (LINE,), X, {"all_reduce": 1}, 12, out=P()),
    "every other": Case(lambda x: x[1::2], (ROWS,), X, {}, 0),
    "every third": Case(lambda x: x[2::3], (np.arange(90.0, dtype=np.float32),), X, permutes(1), 4),
    "pad": Case(lambda x: jnp.pad(x, (2, 3), constant_values=7), (LINE,), X, permutes(1), 16),
    "pad by shards": Case(lambda x: jnp.pad(x, (20, 30)), (LINE,), X, permutes(2), 48),
    "pad negative": Case(lambda x: lax.pad(x, 7.0, [(-3, 5, 0)]), (LINE,), X, permutes(1), 24),
    "pad inside": Case(lambda x: lax.pad(x, 7.0, [(-3, 5, 2)]), (LINE,), X, permutes(1), 4),
    "pad evenly inside": Case(
        lambda x: lax.pad(x, 7.0, [(1, 0, 1), (0, 0, 1)]), (ROWS,), X, {}, 0
    ),
    "concatenate": Case(
        lambda x, y: jnp.concatenate([x, y]), (LINE, LINE[:8]), X, permutes(4), 48, rest=(X,)
    ),
    "roll": Case(lambda x: jnp.roll(x, 3), (LINE,), X, permutes(1), 12),
    "roll backwards": Case(lambda x: jnp.roll(x, -7), (LINE,), X, permutes(2), 24),
    "gradient of roll": Case(
        square_of(lambda x: jnp.roll(x, 3) * LINE), (LINE,), X, permutes(2), 24
    ),
    "wrapped pad": Case(lambda x: jnp.pad(x, 4, mode="wrap"), (LINE,), X, permutes(2), 24),
    "rev": Case(lambda x: x[::-1], (LINE,), X, permutes(1), 24),
    "rev uneven": Case(lambda x: x[::-1], (ROWS,), X, permutes(2), 144),
    "rev over two axes": Case(
        lambda x: x[::-1], (ROWS,), P(("x", "y")), permutes(2), 96, mesh="x=3,y=2"
    ),
    "tile": Case(lambda x: jnp.tile(x, 3), (LINE,), X, permutes(2), 48),
    "split": Case(lambda x: jnp.split(x, [8])[1], (LINE,), X, permutes(1), 16),
}  # fmt: skip

WINDOWS = {
    "same": convolved(conv(), kinds=permutes(2), bytes=2 * ROW),
    "both dims": convolved(
        conv(), spec=HW, mesh="x=2,y=3", kinds=permutes(3), bytes=768
    ),
    "stride": convolved(conv(window_strides=(2, 1)), kinds=permutes(1), bytes=ROW),
    "valid": convolved(conv(padding="VALID"), kinds=permutes(1), bytes=2 * ROW),
    "padding of shards": convolved(
        conv(padding=[(5, 2), (0, 0)]), kinds=permutes(1), bytes=4 * ROW
    ),
    "base dilation": convolved(
        conv(padding=[(2, 3), (0, 0)], lhs_dilation=(2, 1)), kinds=permutes(1), bytes=ROW
    ),
    "base dilation and stride": convolved(
        conv(padding=[(2, 3), (0, 0)], window_strides=(2, 1), lhs_dilation=(3, 1)),
        kinds={}, bytes=0,
    ),
    "window dilation": convolved(conv(rhs_dilation=(4, 1)), kinds=permutes(2), bytes=8 * ROW),
    "halo beyond the neighbour": convolved(
        conv(rhs_dilation=(8, 1)), kinds=permutes(3), bytes=14 * ROW
    ),
    "one dim over two axes": convolved(
        conv(), spec=P(None, None, ("x", "y")), mesh="x=2,y=3", kinds=permutes(2), bytes=2 * ROW
    ),
    "weight gradient": convolved(
        square_of(conv(), 1), out=P(), kinds={"collective_permute": 2, "all_reduce": 1},
        bytes=2 * ROW + 2 * 3 / 4 * KERNEL.nbytes,
    ),
    "input gradient": convolved(
        square_of(conv(window_strides=(2, 1))), kinds=permutes(2), bytes=ROW + 4 * 2 * 4 * 11
    ),
    "depthwise": convolved(
        conv(feature_group_count=6), args=(normal(4, 6, 8, 8), normal(6, 1, 3, 3)),
        spec=P(None, "x"), mesh="x=3", kinds={}, bytes=0,
    ),
    "groups, batch split": convolved(
        conv(feature_group_count=2), args=(normal(4, 6, 8, 8), normal(6, 3, 3, 3)),
        spec=X, kinds={}, bytes=0,
    ),
    "groups, rows split": convolved(
        conv(feature_group_count=2), args=(normal(4, 6, 8, 8), normal(6, 3, 3, 3)),
        mesh="x=2", kinds=permutes(1), bytes=4 * 4 * 6 * 8,
    ),
    "batch groups": convolved(
        conv(batch_group_count=2), args=(normal(4, 6, 8, 8), normal(4, 6, 3, 3)),
        spec=X, out=P(None, "x"), mesh="x=2", kinds={}, bytes=0,
    ),
    "max pool": Case(max_pool, (IMAGE,), HW, permutes(1), 96, mesh="x=2,y=3"),
    "gradient of max pool": Case(
        square_of(max_pool), (IMAGE,), HW, permutes(3), 336, mesh="x=2,y=3"
    ),
    "sum pool": Case(sum_pool, (IMAGE,), HW, permutes(1), 96, mesh="x=2,y=3"),
    "gradient of sum pool": Case(
        square_of(sum_pool), (IMAGE,), HW, permutes(3), 528, mesh="x=2,y=3"
    ),
    "windows with gaps": Case(
        square_of(
            lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 5, 3), "VALID")
        ),
        (IMAGE,), HW, permutes(3), 1224, mesh="x=2,y=3",
    ),
}  # fmt: skip

TOTALS = {"all_gather": 1}
MOVED = {"all_to_all": 2}
INTS = np.random.default_rng(0).integers(0, 9, 64).astype(np.int32)
NANS = np.array([3, np.nan, 1, -np.nan, 5, -np.inf, 7], np.float32)
ORDER = {
    "cumsum": Case(lambda x: jnp.cumsum(x, 0), (ROWS,), X, TOTALS, 72),
    "cumprod": Case(lambda x: jnp.cumprod(x, 0), (ROWS,), X, TOTALS, 72),
    "cummax": Case(lambda x: lax.cummax(x), (ROWS,), X, TOTALS, 72),
    "cummin reverse": Case(lambda x: lax.cummin(x, reverse=True), (ROWS,), X, TOTALS, 72),
    "cumlogsumexp": Case(lambda x: lax.cumlogsumexp(x), (ROWS,), X, TOTALS, 72),
    "cumsum reverse": Case(lambda x: lax.cumsum(x, reverse=True), (ROWS,), X, TOTALS, 72),
    "sort, a dim free": Case(lambda x: jnp.sort(x, 0), (normal(24, 8),), X, MOVED, 288),
    "sort, no dim free": Case(jnp.sort, (INTS,), X, permutes(6), 6 * 4 * 8, mesh="x=8"),
    "argsort": Case(jnp.argsort, (np.tile(INTS, 64),), X, permutes(63), 63 * 4 * 64, mesh="x=64"),
    "top_k": Case(
        lambda x: lax.top_k(x, 2), (normal(2, 40),), P(None, "x"), {"all_gather": 2}, 96, out=P()
    ),
    "top_k with NaN": Case(
        lambda x: lax.top_k(x, 1), (np.tile(NANS, 5),), X, {"all_gather": 2}, 24, out=P()
    ),
    "top_k, batch split": Case(lambda x: lax.top_k(x, 3), (normal(8, 9),), X, {}, 0),
    "approx_max_k": Case(
        lambda x: lax.approx_max_k(x, 2), (normal(2, 40),), P(None, "x"), {"all_gather": 2}, 96,
        out=P(),
    ),
    "approx_min_k": Case(
        lambda x: lax.approx_min_k(x, 2), (normal(2, 40),), P(None, "x"), {"all_gather": 2}, 96,
        out=P(),
    ),
    "argmax": Case(
        lambda x: jnp.argmax(x, 1), (normal(8, 24),), P(None, "x"), {"all_reduce": 2}, 96, out=P()
    ),
    "argmin of ties": Case(jnp.argmin, (INTS,), X, {"all_reduce": 2}, 12, out=P()),
    "argmax with NaN": Case(jnp.argmax, (NANS,), X, {"all_reduce": 2}, 12, out=P()),
    "a user's reduction": Case(
        lambda x: lax.reduce(x, np.float32(2), lambda a, b: a * b + a + b, (1,)),
        (normal(8, 23),), P(None, "x"), TOTALS, 96, out=P(),
    ),
    "fft, batch split": Case(lambda x: jnp.fft.fft(x), (COMPLEX,), X, {}, 0, mesh="x=3"),
    "fft, a dim free": Case(
        lambda x: jnp.fft.fft(x, axis=1), (STACK,), P(None, "x"), MOVED, 1296
    ),
    "fft2": Case(jnp.fft.fft2, (COMPLEX,), P(None, "x"), MOVED, 1296),
    "rfft2": Case(jnp.fft.rfft2, (normal(3, 10, 9),), P(None, "x"), MOVED, 864),
    "irfft2": Case(jnp.fft.irfft2, (COMPLEX,), P(None, "x"), MOVED, 1296),
}  # fmt: skip
CASES = {**STRETCHES, **WINDOWS, **ORDER}


@pytest.mark.parametrize("name", CASES)
def test_strategies(name: str) -> None:
    case = CASES[name]
    specs = (case.spec, *case.rest)
    out = case.spec if case.out is None else case.out
    plan = gspmd.plan(case.fn, *case.args, mesh=case.mesh, in_specs=specs, out_specs=out)
    assert kinds(plan) == case.kinds
    assert plan.wire_bytes == case.bytes
    assert plan.findings == ()
    agrees(plan, case.fn, *case.args)


def test_the_cause_of_an_exchange_is_told() -> None:
    plan = gspmd.plan(conv(), IMAGE, KERNEL, mesh="x=4", in_specs=(H, P()))
    why = plan.why(1)
    assert "its shards need entries of each other" in why
    assert "the spec of x" in why


def test_what_stays_in_place_ends_where_its_own_dim_ends() -> None:
    """Of 18 entries in shards of 5 the first 17 move nowhere, and yet are fewer."""

    def fn(x: Any) -> Any:
        return x[:17], x[:17].max(), x.max()

    x = np.arange(18, dtype=np.float32)
    plan = gspmd.plan(fn, x, mesh="x=4", in_specs=(P("x"),), out_specs=(P("x"), P(), P()))
    assert kinds(plan) == {"all_reduce": 1}
    agrees(plan, fn, x)


def test_what_is_cut_off_in_place_is_cut_off_inside_of_a_branch() -> None:
    def fn(x: Any, first: Any) -> Any:
        return lax.cond(first, lambda x: x[:15], lambda x: x[1:], x)

    x = normal(16)
    plan = gspmd.plan(fn, x, True, mesh="x=4", in_specs=(P("x"), P()), out_specs=P("x"))
    agrees(plan, fn, x, True)


def test_equal_keys_stay_in_order_if_any_key_is_a_float() -> None:
    """0.0 and -0.0 are equal keys; two devices that disagree on their order would lose one."""

    def fn(major: Any, minor: Any) -> Any:
        return jnp.signbit(lax.sort((major, minor), num_keys=2)[1])

    minor = np.array([0, -0.0, 0, -0.0, -0.0, 0, -0.0, -0.0] * 16, np.float32)
    major = np.zeros(128, np.int32)
    plan = gspmd.plan(fn, major, minor, mesh="x=16", in_specs=(P("x"), P("x")), out_specs=P("x"))
    assert kinds(plan) == {"collective_permute": 30}
    agrees(plan, fn, major, minor)


@pytest.mark.parametrize("fn", [lax.cumsum, lax.cumprod, lax.cummax, lax.cummin])
def test_prefixes_of_numbers_narrower_than_a_byte(fn: Callable[..., Any]) -> None:
    x = (np.arange(64) % 5 - 2).astype(jnp.int4)
    plan = gspmd.plan(fn, x, mesh="x=4", in_specs=(P("x"),), out_specs=P("x"))
    assert kinds(plan) == {"all_gather": 1}
    assert plan.findings == ()
    expected = np.asarray(jax.jit(fn)(x))
    np.testing.assert_array_equal(plan.simulate(x), expected)


@pytest.mark.parametrize("reverse", [False, True])
def test_complex_numbers_have_no_neutral_element_of_logsumexp(reverse: bool) -> None:
    def fn(x: Any) -> Any:
        return lax.cumlogsumexp(x, reverse=reverse)

    x = (normal(9) + 1j * normal(9, seed=1)).astype(np.complex64)
    plan = gspmd.plan(fn, x, mesh="x=4", in_specs=(P("x"),))
    agrees(plan, fn, x)


@pytest.mark.parametrize("shape", [(8, 0), (0, 8)])
def test_a_reduction_of_nothing_is_its_initial_value(shape: tuple[int, ...]) -> None:
    def fn(x: Any) -> Any:
        return lax.reduce(x, np.float32(2), lambda a, b: a * b + a + b, (0, 1))

    x = np.zeros(shape, np.float32)
    plan = gspmd.plan(fn, x, mesh="x=4", in_specs=(P("x"),))
    agrees(plan, fn, x)


@pytest.mark.parametrize("name", ["same", "roll", "sort, no dim free", "one dim over two axes"])
def test_devices_agree_with_the_simulation(name: str) -> None:
    case = CASES[name]
    mesh = jax.make_mesh(*_sizes(case.mesh), axis_types=_auto(case.mesh))
    plan = gspmd.plan(case.fn, *case.args, mesh=mesh, in_specs=(case.spec, *case.rest))
    np.testing.assert_array_equal(plan.run(*case.args), plan.simulate(*case.args))


def _sizes(mesh: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
    names, sizes = zip(*(part.split("=") for part in mesh.split(",")), strict=True)
    return tuple(map(int, sizes)), tuple(names)


def _auto(mesh: str) -> tuple[Any, ...]:
    return (jax.sharding.AxisType.Auto,) * len(mesh.split(","))
