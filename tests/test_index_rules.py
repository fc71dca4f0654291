"""Indexing along split dims: each strategy with its values, its collectives and its bytes."""

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import agrees, kinds
from jax import lax

import gspmd
from gspmd import P, run
from gspmd.rules.cases import Sample, case_of
from gspmd.rules.check import check
from gspmd.rules.samples import floats, ints

X = P("x")
TABLE = floats(16, 8)
ROW = TABLE[0].nbytes
WIDE = floats(300, 4)  # more rows than an 8-bit index counts, an uneven number on four devices
EVERYWHERE = ints(5, low=-20, high=20)  # rows, some out of bounds
NOWHERE: dict[str, int] = {}


def reduced(nbytes: float, devices: int = 4) -> tuple[dict[str, int], float]:
    """One all_reduce of `nbytes`."""
    return {"all_reduce": 1}, 2 * (devices - 1) / devices * nbytes


def scattered(nbytes: float, devices: int = 4) -> tuple[dict[str, int], float]:
    """One reduce_scatter of `nbytes`."""
    return {"reduce_scatter": 1}, (devices - 1) / devices * nbytes


def gathered(*nbytes: float, devices: int = 4) -> tuple[dict[str, int], float]:
    """One all_gather for each of `nbytes`, whole."""
    return {"all_gather": len(nbytes)}, (devices - 1) / devices * sum(nbytes)


def take_rows(count: int, mode: str) -> Callable[[Any, Any], Any]:
    """Windows of `count` rows from each start in a vector."""
    numbers = lax.GatherDimensionNumbers((1, 2), (), (0,))
    return lambda x, i: lax.gather(x, i[:, None], numbers, (count, x.shape[1]), mode=mode)


def put_rows(fn: Any, mode: str, **options: Any) -> Callable[[Any, Any, Any], Any]:
    """`fn`, a scatter, of windows of rows at each start in a vector."""
    numbers = lax.ScatterDimensionNumbers((1, 2), (), (0,))
    return lambda x, i, u: fn(x, i[:, None], u, numbers, mode=mode, **options)


def cut(size: int, dim: int = 0) -> Callable[[Any, Any], Any]:
    return lambda x, i: lax.dynamic_slice_in_dim(x, i, size, dim)


def put(x: Any, u: Any, i: Any) -> Any:
    return lax.dynamic_update_slice(x, u, (i, 0))


@dataclasses.dataclass(frozen=True)
class Use:
    """`fn(*args)`, its specs, and the kinds and wire bytes of the collectives that it takes."""

    fn: Callable[..., Any]
    args: Sequence[Any]
    specs: Any
    sent: tuple[dict[str, int], float]
    out: P | None = None
    mesh: str = "x=4"

    def plan(self) -> gspmd.Plan:
        return gspmd.plan(
            self.fn, *self.args, mesh=self.mesh, in_specs=self.specs, out_specs=self.out
        )

    def check(self) -> None:
        """The plan computes `fn` with these collectives, and finds nothing."""
        plan = self.plan()
        agrees(plan, self.fn, *self.args)
        assert (kinds(plan), plan.wire_bytes) == self.sent
        assert plan.findings == ()


# --- reading

READS: dict[str, Use] = {
    "a row that the program names": Use(lambda x: x[5], (TABLE,), (X,), reduced(ROW)),
    "a row that is computed": Use(
        lambda x, i: x[i], (TABLE, np.int32(-2)), (X, None), reduced(ROW)
    ),
    "a row, wanted in pieces": Use(
        lambda x, i: x[i], (TABLE, np.int32(9)), (X, None), scattered(ROW), X,
    ),
    "a column of split rows": Use(
        lambda x, i: x[:, i], (TABLE, np.int32(9)), (X, None), (NOWHERE, 0),
    ),
    "many rows": Use(lambda x, i: x[i], (TABLE, EVERYWHERE), (X, None), reduced(5 * ROW)),
    "many rows, each device some": Use(
        lambda x, i: x[i], (TABLE, ints(4, 4)), (None, X), (NOWHERE, 0),
    ),
    "rows by small integers": Use(
        lambda x, i: jnp.take(x, i, axis=0, mode="fill", fill_value=0),
        (WIDE, np.array([-128, -1, 0, 127], np.int8)), (X, None), reduced(4 * 16),
    ),
    "rows by small unsigned integers": Use(
        lambda x, i: x.at[i].get(mode="clip"),
        (WIDE, np.array([255, 0, 128], np.uint8)), (X, None), reduced(3 * 16),
    ),
    "rows by large unsigned integers": Use(
        lambda x, i: x.at[i].get(mode="fill"),
        (WIDE, np.array([2**32 - 1, 299, 300], np.uint32)), (X, None), reduced(3 * 16),
    ),
    "along a dim": Use(
        lambda x, i: jnp.take_along_axis(x, i, 0), (TABLE, ints(3, 8, high=16)), (X, None),
        reduced(3 * ROW),
    ),
    "along a dim, in a batch": Use(
        lambda x, i: jnp.take_along_axis(x, i, 0), (TABLE, ints(3, 8, high=16)),
        (P(None, "x"), None), (NOWHERE, 0),
    ),
    "points of two split dims": Use(
        lambda x, i: x[i, i % 8], (TABLE, ints(6, high=16)), (P("x", "y"), None),
        reduced(6 * 4), None, "x=2,y=2",
    ),
    "windows of rows": Use(
        take_rows(3, "clip"), (WIDE, np.array([-4, 73, 299])), (X, None), reduced(9 * 16),
    ),
    "windows of rows, some out of bounds": Use(
        take_rows(3, "fill"), (WIDE, np.array([-1, 74, 297, 298])), (X, None), reduced(12 * 16),
    ),
    "windows larger than a shard": Use(
        take_rows(90, "fill"), (WIDE, np.array([20])), (X, None), reduced(90 * 16),
    ),
    "windows as large as the table": Use(  # whose shards are fewer bytes than their rows
        take_rows(13, "clip"), (TABLE, np.array([0, 2])), (X, None), gathered(16 * ROW),
    ),
    "keys": Use(
        lambda k, i: jax.random.key_data(k[i]),
        (jax.random.split(jax.random.key(0), 8), np.int32(5)), (X, None), reduced(8),
    ),
    "booleans": Use(lambda x, i: x[i], (TABLE > 0, np.int32(5)), (X, None), reduced(8)),
    "a small slice": Use(cut(3), (TABLE, np.int32(7)), (X, None), reduced(3 * ROW)),
    "a small slice out of bounds": Use(cut(3), (TABLE, np.int32(15)), (X, None), reduced(3 * ROW)),
    "a large slice": Use(cut(12), (TABLE, np.int32(3)), (X, None), gathered(16 * ROW), P()),
    "a large slice, wanted in pieces": Use(
        cut(12), (TABLE, np.int32(3)), (X, None), scattered(12 * ROW), X,
    ),
    "pieces of a slice": Use(cut(12), (TABLE, np.int32(3)), (None, None), (NOWHERE, 0), X),
    "uneven pieces of a slice": Use(cut(10), (TABLE, np.int32(6)), (None, None), (NOWHERE, 0), X),
    "pieces over another axis": Use(
        cut(6), (TABLE, np.int32(6)), (X, None), reduced(3 * ROW, 2), P("y"), "x=2,y=2",
    ),
    "a window of two split dims": Use(
        lambda x, i: lax.dynamic_slice(x, (i, i), (5, 3)), (TABLE, np.int32(4)),
        (P("x", "y"), None), reduced(5 * 3 * 4), None, "x=2,y=2",
    ),
    "a word's embedding": Use(  # half of the words are looked for here, the other half there
        lambda x, i: x[i], (floats(64, 8), ints(8, 3, high=64)), (P("x"), P("y")),
        reduced(4 * 3 * 32, 2), P("y"), "x=2,y=2",
    ),
    "a word's embedding, over one axis": Use(
        lambda x, i: x[i], (floats(256, 8), ints(8, 3, high=256)), (X, X),
        ({"all_gather": 1, "reduce_scatter": 1}, 3 / 4 * (8 * 3 * 4 + 8 * 3 * 32)), X,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READS)
def test_read(name: str) -> None:
    READS[name].check()


def test_an_update_wider_than_the_shards_of_two_dims() -> None:
    x, u, i, j = floats(16, 8), floats(11, 7), np.int32(3), np.int32(1)

    def fn(x: Any, u: Any, i: Any, j: Any) -> Any:
        return lax.dynamic_update_slice(x, u, (i, j))

    specs = (P("x", "y"), P(None, "y"), P(), P())
    plan = gspmd.plan(fn, x, u, i, j, mesh="x=2,y=2", in_specs=specs, out_specs=P("x", "y"))
    agrees(plan, fn, x, u, i, j)


def test_what_other_devices_hold_does_not_leak() -> None:
    """Infinities and NaNs in the other rows, and in the row itself."""
    x = np.full((8, 3), np.nan, np.float32)
    x[3] = 1, np.inf, -np.inf
    x[7] = 2
    pick = lambda x, i: (x[i[0]], x[i], cut(1)(x, i[1]))  # noqa: E731
    plan = gspmd.plan(pick, x, np.array([3, 7, 0]), mesh="x=4", in_specs=(X, None))
    agrees(plan, pick, x, np.array([3, 7, 0]))


# --- writing

UPDATES = floats(5, 8)
WRITES: dict[str, Use] = {
    "a row that the program names": Use(lambda x: x.at[3].set(1.0), (TABLE,), (X,), (NOWHERE, 0)),
    "a row that is computed": Use(
        lambda x, i: x.at[i].set(1.0), (TABLE, np.int32(-3)), (X, None), (NOWHERE, 0)
    ),
    "a row added to": Use(
        lambda x, i: x.at[i].add(1.0), (TABLE, np.int32(40)), (X, None), (NOWHERE, 0)
    ),
    "many rows": Use(
        lambda x, i, u: x.at[i].max(u), (TABLE, EVERYWHERE, UPDATES), (X, None, None), (NOWHERE, 0)
    ),
    "many rows multiplied": Use(
        lambda x, i, u: x.at[i].multiply(u), (TABLE, EVERYWHERE, UPDATES), (X, None, None),
        (NOWHERE, 0),
    ),
    "rows applied to": Use(
        lambda x, i: x.at[i].apply(jnp.sin), (TABLE, EVERYWHERE), (X, None), (NOWHERE, 0)
    ),
    "columns of split updates": Use(
        lambda x, i, u: x.at[i].set(u), (TABLE, np.array([1, 9, 4, 0, 7]), UPDATES),
        (P(None, "x"), None, P(None, "x")), (NOWHERE, 0),
    ),
    "rows by small unsigned integers": Use(
        lambda x, i, u: x.at[i].min(u, mode="clip"),
        (WIDE, np.array([255, 0, 200], np.uint8), floats(3, 4)), (X, None, None), (NOWHERE, 0),
    ),
    "windows of rows": Use(
        put_rows(lax.scatter_add, "clip"), (WIDE, np.array([-4, 73, 299]), floats(3, 4, 4)),
        (X, None, None), (NOWHERE, 0),
    ),
    "windows of rows, some out of bounds": Use(
        put_rows(lax.scatter, "drop", unique_indices=True),
        (WIDE, np.array([-1, 74, 297, 296]), floats(4, 4, 4)), (X, None, None), (NOWHERE, 0),
    ),
    "windows larger than a shard": Use(
        put_rows(lax.scatter_mul, "drop"), (WIDE, np.array([20, 100]), floats(2, 180, 4)),
        (X, None, None), (NOWHERE, 0),
    ),
    "a batch of tables": Use(
        jax.vmap(lambda x, i, u: x.at[i].set(u)), (floats(4, 6, 3), ints(4), floats(4, 3)),
        (X, X, X), (NOWHERE, 0),
    ),
    "many updates of few rows, each device some": Use(
        lambda x, i, u: x.at[i].add(u), (TABLE, ints(400, high=16), floats(400, 8)),
        (None, X, X), reduced(16 * ROW), P(),
    ),
    "many factors of few rows, each device some": Use(
        lambda x, i, u: x.at[i].multiply(u),
        (TABLE, ints(401, high=99), floats(401, 8, low=0.99, high=1.01)),
        (None, X, X), reduced(16 * ROW), P(),
    ),
    "many maxima of few rows, each device some": Use(
        lambda x, i, u: x.at[i].max(u), (TABLE, ints(401, high=99), floats(401, 8)),
        (None, X, X), reduced(16 * ROW), P(),
    ),
    "many updates of few split rows": Use(
        lambda x, i, u: x.at[i].add(u), (TABLE, ints(400, high=16), floats(400, 8)),
        (X, X, X), ({"all_gather": 1, "reduce_scatter": 1}, 2 * 3 / 4 * 16 * ROW), X,
    ),
    "few updates, each device some": Use(
        lambda x, i, u: x.at[i].add(u), (TABLE, ints(4, high=16), floats(4, 8)),
        (None, X, X), gathered(4 * 4, 4 * ROW), P(),
    ),
    "the gradient of embeddings": Use(
        jax.grad(lambda x, i: jnp.sum(x[i] ** 2)), (TABLE, ints(400, high=16)), (None, X),
        reduced(16 * ROW), P(),
    ),
    "a stretch of rows": Use(
        put, (TABLE, floats(6, 8), np.int32(3)), (X, None, None), (NOWHERE, 0)
    ),
    "a stretch out of bounds": Use(
        put, (TABLE, floats(6, 8), np.int32(-30)), (X, None, None), (NOWHERE, 0)
    ),
    "a stretch larger than a shard": Use(
        put, (WIDE, floats(200, 4), np.int32(71)), (X, None, None), (NOWHERE, 0)
    ),
    "a stretch of columns": Use(
        put, (TABLE, floats(6, 8), np.int32(3)), (P(None, "x"), P(None, "x"), None), (NOWHERE, 0)
    ),
    "a stretch of two split dims": Use(
        lambda x, u, i: lax.dynamic_update_slice(x, u, (i, i)),
        (TABLE, floats(9, 3), np.int32(6)), (P("x", "y"), None, None), (NOWHERE, 0),
        None, "x=2,y=2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITES)
def test_write(name: str) -> None:
    WRITES[name].check()


@pytest.mark.parametrize(
    ("fn", "specs", "sent"),
    [
        (lambda x, i, u: x.at[i].set(u), (X, X, X), gathered(4 * 4, 4 * ROW)),
        (lambda x, i, u: put(x, u, i[0]), (X, None, X), gathered(4 * ROW)),
    ],
)
def test_updates_that_replace_are_gathered(fn: Any, specs: Any, sent: Any) -> None:
    """Which of two updates stays, no sum can tell; where a stretch falls, nobody knows before."""
    args = (TABLE, ints(4, high=16), floats(4, 8))
    plan = gspmd.plan(fn, *args, mesh="x=4", in_specs=specs)
    agrees(plan, fn, *args)
    assert (kinds(plan), plan.wire_bytes) == sent
    assert plan.findings == ()  # every device needs them: there is no better way


@pytest.mark.parametrize(("specs", "unique"), [((X, None, None), True), ((None, X, X), False)])
def test_unique_updates_stay_unique(specs: Any, unique: bool) -> None:
    """What a device drops is no update. Shared out, padding repeats what another updates."""
    add = lambda x, i, u: x.at[i].add(u, unique_indices=True)  # noqa: E731
    args = (TABLE[:3], np.arange(399), floats(399, 8))
    plan = gspmd.plan(add, *args, mesh="x=4", in_specs=specs)
    agrees(plan, add, *args)
    assert plan.findings == ()
    text = str(jax.make_jaxpr(run.simulator(plan.program, plan.mesh))(*args))
    assert f"unique_indices={unique}" in text
    assert f"unique_indices={not unique}" not in text


ON_DEVICES = [
    READS["windows of rows, some out of bounds"],
    READS["a large slice, wanted in pieces"],
    READS["a word's embedding, over one axis"],
    READS["keys"],
    WRITES["windows of rows"],
    WRITES["many maxima of few rows, each device some"],
    WRITES["a stretch larger than a shard"],
]


@pytest.mark.parametrize("use", ON_DEVICES)
def test_devices_agree_with_the_simulation(use: Use) -> None:
    """Bit for bit: of the summands of a row, all but one are zero."""
    plan = use.plan()
    simulated, real = plan.simulate(*use.args), plan.run(*use.args)
    np.testing.assert_array_equal(np.asarray(real), np.asarray(simulated))


# --- drawn

SCATTERS = {
    "scatter-add": lax.scatter_add,
    "scatter-sub": lax.scatter_sub,
    "scatter-mul": lax.scatter_mul,
    "scatter-max": lax.scatter_max,
    "scatter-min": lax.scatter_min,
}


def drawn(seed: int) -> Sample:
    """A gather or a scatter of any form: batches, windows, dims in any order, out of bounds."""
    choice, rng = random.Random(seed), np.random.default_rng(seed)
    shape = [choice.randint(2, 6) for _ in range(choice.randint(1, 3))]
    batch = [choice.randint(2, 4) for _ in range(choice.randint(0, 2))]
    paired = choice.randint(0, min(len(shape) - 1, len(batch)))
    together = sorted(choice.sample(range(len(shape)), paired))
    dims = choice.sample(range(len(batch)), paired)
    for d, i in zip(together, dims, strict=True):
        batch[i] = shape[d]
    rest = [d for d in range(len(shape)) if d not in together]
    collapsed = [d for d in rest if choice.random() < 0.4]
    kept = [d for d in rest if d not in collapsed]
    sizes = [choice.choice([n, choice.randint(1, n)]) if d in kept else 1
             for d, n in enumerate(shape)]  # fmt: skip
    rank = len(batch) + len(kept)
    windows = tuple(sorted(choice.sample(range(rank), len(kept))))
    indexed = tuple(choice.sample(rest, choice.randint(1, len(rest))))
    numbers = (windows, tuple(collapsed), indexed, tuple(together), tuple(dims))
    signed = choice.choice([np.int8, np.int32, np.uint8])
    indices = rng.integers(0, 7, (*batch, len(indexed))) - (0 if signed == np.uint8 else 1)
    table, mode = floats(*shape), choice.choice(["fill", "clip"])
    args: tuple[Any, ...] = (table, indices.astype(signed))
    if choice.random() < 0.5:
        how = lax.GatherDimensionNumbers(*numbers)
        return Sample("gather", lambda x, i: lax.gather(x, i, how, sizes, mode=mode), args)
    name, fn = choice.choice(list(SCATTERS.items()))
    runs, along = iter(sizes[d] for d in kept), iter(batch)
    updates = floats(*(next(runs) if p in windows else next(along) for p in range(rank)))
    at = lax.ScatterDimensionNumbers(*numbers)
    return Sample(name, lambda x, i, u: fn(x, i, u, at, mode=mode), (*args, updates))


def check_drawn(seeds: range) -> None:
    """Every factor split, the pieces run and put together: the result of the whole."""
    rows = check(map(drawn, seeds), exhaustive=False)
    wrong = [f"{seed}: {row}" for seed, row in zip(seeds, rows, strict=True) if row.wrong]
    assert wrong == []


def test_drawn_indexing() -> None:
    check_drawn(range(32))


@pytest.mark.exhaustive
@pytest.mark.parametrize("start", range(32, 1024, 32))
def test_much_drawn_indexing(start: int) -> None:
    check_drawn(range(start, start + 32))


def test_drawn_indexing_is_of_every_form() -> None:
    """Windows over several rows, batches of tables, index vectors of several components."""
    found = [case_of(drawn(seed)) for seed in range(32)]
    assert len({case.primitive for case in found}) == 1 + len(SCATTERS)
    assert any(case.op.params["dimension_numbers"].operand_batching_dims for case in found)
    assert any(case.words[1].shape[-1] > 1 for case in found)
    assert sum("sum" in case.rule.kinds and "whole" in case.rule.kinds for case in found) > 4
