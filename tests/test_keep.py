"""What remat would send again is kept: the same values, fewer bytes, no more room than given."""

import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gspmd
from gspmd import P
from gspmd.optimize.keep import keep
from gspmd.printing import show
from gspmd.testing import assert_equivalent

MESH = {"x": 2, "y": 4}
LAYERS, ROWS, WIDTH, HIDDEN = 3, 8, 16, 32
PIECE = LAYERS * (ROWS // 2) * (WIDTH // 4) * 4  # a scattered result of each layer, in bytes
PASS = 3 / 4 * (ROWS // 2) * WIDTH * 4 * LAYERS  # sent by a scatter over y in each layer

Params = dict[str, jax.Array]


def layer(h: Any, w: Params) -> Any:
    """An MLP whose products owe sums over y, which are scattered."""
    h = gspmd.annotate(h, P("x", "y"))
    up = gspmd.annotate(jnp.tanh(h @ w["up"]), P("x", "y"))
    middle = gspmd.annotate(up @ w["middle"], P("x", "y"))
    return h + gspmd.annotate(jnp.sin(middle) @ w["down"], P("x", "y"))


def loss(layer: Any, reverse: bool, params: Params, x: Any) -> Any:
    def step(h: Any, w: Params) -> tuple[Any, None]:
        return layer(h, w), None

    h, _ = jax.lax.scan(step, x, params, reverse=reverse)
    return jnp.sum(jnp.square(h))


def arguments() -> tuple[dict[str, Any], np.ndarray]:
    random = np.random.default_rng(0)
    draw = lambda *shape: 0.2 * random.normal(size=shape).astype(np.float32)  # noqa: E731
    up, middle = draw(LAYERS, WIDTH, HIDDEN), draw(LAYERS, HIDDEN, WIDTH)
    return {"up": up, "middle": middle, "down": draw(LAYERS, WIDTH, WIDTH)}, draw(ROWS, WIDTH)


SPECS = ({"up": P(None, None, "y"), "middle": P(None, "y"), "down": P()}, P("x", "y"))


def plan(room: int, policy: Any = None, reverse: bool = False) -> gspmd.Plan:
    remat = jax.checkpoint(layer, policy=policy)
    fn = jax.grad(functools.partial(loss, remat, reverse))
    options = gspmd.Options(keep=room)
    return gspmd.plan(fn, *arguments(), mesh=MESH, in_specs=SPECS, options=options)


def kinds(made: gspmd.Plan) -> dict[str, int]:
    found: dict[str, int] = collections.Counter()
    for one in made.collectives:
        found[one.kind] += one.trips
    return found


def test_a_scattered_sum_is_sent_once() -> None:
    as_written, kept = plan(0), plan(PIECE)
    assert kinds(as_written)["reduce_scatter"] - kinds(kept)["reduce_scatter"] == LAYERS
    assert as_written.wire_bytes - kept.wire_bytes >= PASS


def test_no_more_is_kept_than_there_is_room_for() -> None:
    assert show(plan(0).program) == show(plan(PIECE - 1).program)
    sent = [plan(room).wire_bytes for room in (0, PIECE, 10 * PIECE, 1000 * PIECE)]
    assert sent == sorted(sent, reverse=True)


@pytest.mark.parametrize("room", [PIECE, 1000 * PIECE])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "policy", [None, jax.checkpoint_policies.dots_saveable], ids=["all", "dots saved"]
)
def test_gradients_are_those_of_the_whole_program(policy: Any, reverse: bool, room: int) -> None:
    assert_equivalent(
        functools.partial(loss, jax.checkpoint(layer, policy=policy), reverse),
        *arguments(),
        mesh=MESH,
        in_specs=SPECS,
        options=gspmd.Options(keep=room),
        rtol=1e-4,
    )


def test_nothing_is_left_to_keep() -> None:
    made = plan(1000 * PIECE)
    assert show(keep(made.program, made.mesh, 1000 * PIECE)) == show(made.program)


def test_shards_of_unlike_splits_are_not_taken_for_each_other() -> None:
    """Two loops of one length, over iotas of one local shape, split over unlike axes."""

    def fn(x: Any) -> Any:
        def summed(spec: P) -> Any:
            def step(total: Any, row: Any) -> tuple[Any, Any]:
                places = gspmd.annotate(jnp.arange(8.0), spec)
                kept = gspmd.annotate(jnp.cumsum(places * row), P())
                return total + kept, kept

            return jax.lax.scan(step, jnp.zeros(8), x)

        return summed(P("a")), summed(P("b"))

    x = np.ones((3, 1), np.float32)
    assert_equivalent(fn, x, mesh={"a": 2, "b": 2}, options=gspmd.Options(keep=1 << 20), grad=False)
