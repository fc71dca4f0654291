"""memory: exact bytes where they can be counted by hand, and what holds of every program."""

import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from processes import run
from test_benchmarks import BENCHMARKS

import gspmd
from gspmd.evaluate import evaluate
from gspmd.footprint import Footprint
from gspmd.fusion import fuse
from gspmd.ir import Program, Value, values_of
from gspmd.liveness import FOREVER, Block, lay_out, taken_over
from gspmd.memory import Memory, memory, placed
from gspmd.ordering import order
from gspmd.simplified import simplified
from gspmd.storage import STORAGE, Tiling
from gspmd.testing import DrawnProgram, programs

KB = 1024
TPU = STORAGE["tpu"]


def shape(*dims: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


def planned(
    fn: Callable[..., Any], *args: Any, mesh: Mapping[str, int] | None = None, **how: Any
) -> gspmd.Plan:
    return gspmd.plan(fn, *args, mesh=dict(mesh or {"x": 1}), **how)


def held(fn: Callable[..., Any], *args: Any, on: str = "cpu", **how: Any) -> Memory:
    plan = planned(fn, *args, **how)
    return memory(plan.program, plan.traced.donated, STORAGE[on])


def temporaries(fn: Callable[..., Any], *args: Any, **how: Any) -> float:
    found = held(fn, *args, **how)
    return found.peak_bytes - found.argument_bytes - found.output_bytes


# ----------------------------------------------------------------------------------------- tilings


@pytest.mark.parametrize(
    ("dims", "bytes"),
    [
        ((1_048_576, 32), 1_048_576 * 128 * 4),  # as the TPU compiler prints them, for TPUv3
        ((2, 4096), 2 * 4096 * 4),
        ((1, 1024), 2 * 1024 * 4),
        ((64, 8, 65536), 64 * 8 * 65536 * 4),
        ((4096,), 4096 * 4),
        ((1000,), 1024 * 4),
        ((12, 100), 16 * 128 * 4),
        ((), 4),
        ((0, 7), 0),
    ],
)
def test_a_tile_pads_the_minor_dims(dims: tuple[int, ...], bytes: int) -> None:
    assert Tiling(8, 128).bytes(dims, np.dtype(np.float32)) == bytes


def test_the_compiler_picks_the_dims_that_pad_least() -> None:
    tiling = Tiling(8, 128)
    assert tiling.least((1_048_576, 32), np.dtype(np.float32)) == 1_048_576 * 32 * 4
    assert tiling.least((64, 65536, 8), np.dtype(np.float32)) == 64 * 65536 * 8 * 4
    assert tiling.least((32, 128, 3, 3), np.dtype(np.float32)) == 32 * 128 * 9 * 4


SHAPES = st.lists(st.integers(0, 300), max_size=4).map(tuple)


@hypothesis.given(SHAPES)
def test_padding_only_adds(dims: tuple[int, ...]) -> None:
    dtype, tiling = np.dtype(np.float32), Tiling(8, 128)
    bare = 4 * np.prod(dims, dtype=np.int64)
    assert Tiling(1, 1).bytes(dims, dtype) == Tiling(1, 1).least(dims, dtype) == bare
    assert bare <= tiling.least(dims, dtype) <= tiling.bytes(dims, dtype)
    assert tiling.bytes(dims, dtype) <= max(bare, 1) * 8 * 128


# ------------------------------------------------------------------------------- counted by hand


def test_arguments_results_and_what_is_between() -> None:
    def mlp(x: Any, up: Any, down: Any) -> Any:
        return jnp.tanh(jnp.tanh(x @ up) @ down)

    found = held(mlp, shape(64, 256), shape(256, 512), shape(512, 256))
    assert found.argument_bytes == 64 * KB + 2 * 512 * KB
    assert found.output_bytes == 64 * KB
    assert found.temporary_bytes == 128 * KB  # x @ up; both tanh are computed where they are read
    assert found.peak_bytes == found.reserved_bytes == (64 + 1024 + 64 + 128) * KB


def test_a_chain_of_elementwise_ops_stores_nothing() -> None:
    assert temporaries(lambda x: jnp.sin(jnp.exp(x) * 2) + x, shape(64, 64)) == 0


REFERENCES: Sequence[tuple[str, Callable[..., Any], Sequence[tuple[int, ...]]]] = (
    (
        "products",
        lambda x, a, b, c: ((x @ a) @ b) @ c,
        [(64, 256), (256, 512), (512, 1024), (1024, 64)],
    ),
    ("mlp", lambda x, a, b: jnp.tanh(jnp.tanh(x @ a) @ b), [(64, 256), (256, 512), (512, 256)]),
    (
        "loop",
        lambda x, w: jax.lax.scan(lambda c, _: (jnp.tanh(c @ w) @ w, None), x, None, length=7)[0],
        [(64, 256), (256, 256)],
    ),
    (
        "stack",
        lambda x, w: jax.lax.scan(lambda c, _: (jnp.tanh(c @ w) @ w, c), x, None, length=7),
        [(64, 256), (256, 256)],
    ),
)  # fmt: skip


@pytest.mark.parametrize(
    ("fn", "dims"), [r[1:] for r in REFERENCES], ids=[r[0] for r in REFERENCES]
)
def test_xla_gives_out_as_much(fn: Callable[..., Any], dims: Sequence[tuple[int, ...]]) -> None:
    args = [shape(*one) for one in dims]
    found, compiled = held(fn, *args), jax.jit(fn).lower(*args).compile().memory_analysis()
    assert compiled is not None
    assert found.argument_bytes == compiled.argument_size_in_bytes
    few = 200  # loop counters, and the pointers of tuples
    assert 0 <= compiled.output_size_in_bytes - found.output_bytes < few
    assert 0 <= compiled.temp_size_in_bytes - found.temporary_bytes < few


def test_a_result_takes_the_memory_of_a_donated_argument() -> None:
    def step(w: Any, x: Any) -> Any:
        return w - 0.1 * (x.T @ x), jnp.sum(x)

    kept = held(step, shape(64, 64), shape(8, 64))
    given = held(step, shape(64, 64), shape(8, 64), donate_argnums=0)
    assert kept.output_bytes == 64 * 64 * 4 + 4
    assert given.output_bytes == 4
    assert kept.peak_bytes - given.peak_bytes == 64 * 64 * 4


def test_a_donated_argument_that_is_read_later_is_not_overwritten() -> None:
    def late(w: Any) -> Any:
        new = w @ w
        return new, jnp.sum(jnp.sin(w) * new)

    plan = planned(late, shape(64, 64), donate_argnums=0)
    (out, _), (w,) = values_of(plan.program.outs), plan.program.ins
    assert taken_over(plan.program, plan.traced.donated) == {out: w}
    assert held(late, shape(64, 64), donate_argnums=0).output_bytes >= 64 * 64 * 4


def test_results_take_the_arguments_of_their_type_in_order() -> None:
    plan = planned(
        lambda a, b, c: (b + 1, c + 1, a + 1),
        shape(4),
        shape(4),
        shape(8),
        donate_argnums=(0, 1, 2),
    )
    a, b, c = plan.program.ins
    first, second, third = values_of(plan.program.outs)
    assert taken_over(plan.program, plan.traced.donated) == {first: a, second: c, third: b}


# -------------------------------------------------------------------------------------------- loops


def looped(length: int, stacked: bool = False) -> Callable[..., Any]:
    def fn(x: Any, w: Any) -> Any:
        step = lambda c, _: (jnp.tanh(c @ w) @ w, c if stacked else None)  # noqa: E731
        return jax.lax.scan(step, x, None, length=length)

    return fn


def test_what_a_loop_makes_in_a_step_counts_once() -> None:
    args = shape(64, 256), shape(256, 256)
    assert temporaries(looped(3), *args) == temporaries(looped(300), *args) == 64 * KB


def test_what_a_loop_stacks_counts_for_every_step() -> None:
    args = shape(64, 256), shape(256, 256)
    assert held(looped(7, stacked=True), *args).output_bytes == (1 + 7) * 64 * KB


def test_while_counts_as_a_loop_does() -> None:
    def fn(x: Any, w: Any) -> Any:
        return jax.lax.while_loop(lambda c: c[0, 0] < 1, lambda c: jnp.tanh(c @ w) @ w, x)

    assert temporaries(fn, shape(64, 256), shape(256, 256)) == 64 * KB


def test_of_branches_the_largest_counts() -> None:
    def fn(p: Any, x: Any, w: Any, wide: Any) -> Any:
        return jax.lax.cond(
            p, lambda x: jnp.sum((x @ w) @ w), lambda x: jnp.sum((x @ wide) @ wide.T), x
        )

    args = shape(dtype=jnp.bool_), shape(64, 64), shape(64, 64), shape(64, 1024)
    small, large = 16 * KB, 256 * KB
    assert large <= temporaries(fn, *args) <= large + 2 * small + 16


def test_remat_holds_the_residuals_of_one_layer() -> None:
    def loss(ws: Any, x: Any, remat: bool) -> Any:
        def layer(x: Any, w: Any) -> Any:
            return x + jnp.tanh(jnp.tanh(x @ w) @ w.T), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, ws)[0] ** 2)

    layers = 32
    args = shape(layers, 256, 1024), shape(64, 256)
    with_, without = (
        held(jax.grad(lambda w, x, on=on: loss(w, x, on)), *args) for on in (True, False)
    )
    x, h = 64 * KB, 256 * KB
    assert layers * x <= with_.temporary_bytes < layers * x + 8 * (x + h)  # the layers' inputs
    assert without.temporary_bytes >= layers * (x + h)


def test_weights_are_converted_before_the_loop_that_reads_them_so() -> None:
    def fn(x: Any, ws: Any) -> Any:
        step = lambda c, w: (jnp.tanh(c @ w.astype(jnp.bfloat16)), None)  # noqa: E731
        return jax.lax.scan(step, x, ws)[0]

    x, ws = shape(8, 512, dtype=jnp.bfloat16), shape(16, 512, 512)
    assert temporaries(fn, x, ws) >= 16 * 512 * 512 * 2
    program = planned(fn, x, ws).program
    before = {op.name for op in program.ops}
    after = [op.name for op in simplified(program).ops]
    assert "convert_element_type" not in before
    assert after == ["convert_element_type", "scan"]


def test_two_loops_share_the_converted_weights() -> None:
    def fn(x: Any, ws: Any) -> Any:
        step = lambda c, w: (jnp.tanh(c @ w.astype(jnp.bfloat16)), None)  # noqa: E731
        x = jax.lax.scan(step, x, ws)[0]
        return jax.lax.scan(step, x, ws, reverse=True)[0]

    names = [
        op.name
        for op in simplified(
            planned(fn, shape(8, 8, dtype=jnp.bfloat16), shape(4, 8, 8)).program
        ).ops
    ]
    assert names == ["convert_element_type", "scan", "scan"]


# ------------------------------------------------------------------------------------- collectives


def test_an_all_reduce_is_done_in_place_and_a_gather_is_not() -> None:
    mesh = {"x": 4}
    args = shape(64, 1024), shape(1024, 1024)
    summed = held(
        lambda x, w: x @ w, *args, mesh=mesh, in_specs=(P(None, "x"), P("x")), out_specs=P()
    )
    assert (summed.output_bytes, summed.temporary_bytes) == (64 * 1024 * 4, 0)
    gathered = held(jnp.sin, shape(512, 512), mesh=mesh, in_specs=(P("x"),), out_specs=P())
    assert (gathered.output_bytes, gathered.temporary_bytes) == (512 * 512 * 4, 128 * 512 * 4)


# ----------------------------------------------------------------------------------- on a TPU only


def test_rows_that_a_gather_picks_lie_along_the_lanes() -> None:
    pick = lambda table, at: table[at] * 2  # noqa: E731
    args = shape(32, 2), shape(64, 64, dtype=jnp.int32)
    indices, picked, rows = 64 * 64 * 4, 64 * 64 * 2 * 4, 64 * 64 * 128 * 4
    bare, tiled = (held(pick, *args, on=on) for on in ("gpu", "tpu"))
    assert (bare.output_bytes, bare.temporary_bytes) == (picked, indices)
    assert rows <= tiled.peak_bytes - tiled.argument_bytes - tiled.output_bytes <= rows + picked


def test_what_only_products_read_is_kept_in_bfloat16() -> None:
    def fn(x: Any, a: Any, b: Any) -> Any:
        return (x @ a) @ b

    args = shape(64, 256), shape(256, 512), shape(512, 256)
    assert temporaries(fn, *args, on="gpu") == 64 * 512 * 4
    assert temporaries(fn, *args, on="tpu") == 64 * 512 * 2
    exact = lambda *args: jnp.linalg.multi_dot(args, precision="highest")  # noqa: E731
    assert temporaries(exact, *args, on="tpu") == 64 * 512 * 4


def test_features_of_a_convolution_lie_along_the_lanes() -> None:
    def twice(x: Any, w: Any) -> Any:
        conv = lambda x: jax.lax.conv_general_dilated(  # noqa: E731
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(conv(jnp.sin(conv(x)) + 1))

    args = shape(8, 32, 32, 4), shape(3, 3, 4, 4)
    assert temporaries(twice, *args, on="gpu") <= 8 * 32 * 32 * 4 * 4 + 4
    assert temporaries(twice, *args, on="tpu") >= 8 * 32 * 32 * 128 * 2


# -------------------------------------------------------------------------------------------- kinds


def training_step() -> gspmd.Plan:
    adam = optax.adam(1e-3)

    def step(params: Any, state: Any, batch: Any) -> Any:
        def loss(params: Any) -> Any:
            h = jnp.tanh(batch @ params["up"])
            return jnp.sum((h @ params["down"] - batch) ** 2)

        updates, state = adam.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    params = {"up": shape(64, 512), "down": shape(512, 64)}
    state = jax.eval_shape(adam.init, params)
    return planned(step, params, state, shape(32, 64), donate_argnums=(0, 1))


def test_inference_has_no_optimizer_state() -> None:
    """Though it returns what has the type of an input."""
    plan = planned(lambda a, b: jnp.tanh(a @ b), shape(64, 64), shape(64, 64))
    found = memory(plan.program, plan.traced.donated, STORAGE["cpu"])
    assert {one.name: one.kind for one in found.buffers if one.name in "ab"} == {
        "a": "input", "b": "input",
    }  # fmt: skip


def test_each_buffer_says_what_it_is_for() -> None:
    plan = training_step()
    found = memory(plan.program, plan.traced.donated, STORAGE["cpu"])
    kinds: dict[str, list[str]] = {}
    for one in found.buffers:
        kinds.setdefault(one.kind, []).append(one.name)
    assert sorted(kinds["parameter"]) == ["params/down", "params/up"]
    assert kinds["input"] == ["batch"]
    assert {name.split("/")[-1] for name in kinds["optimizer state"]} == {"down", "up", "count"}
    assert kinds["gradient"]
    assert kinds["activation"]
    assert [one.bytes for one in found.buffers] == sorted(
        (one.bytes for one in found.buffers), reverse=True
    )
    assert sum(one.bytes for one in found.buffers) == found.peak_bytes


def test_a_buffer_says_its_type_and_source() -> None:
    plan = planned(
        lambda x, w: jnp.sin(x @ w) @ w.T,
        shape(64, 256),
        shape(256, 512),
        mesh={"data": 4},
        in_specs=(P("data"), P()),
    )
    found = memory(plan.program, plan.traced.donated, STORAGE["cpu"])
    product = next(one for one in found.buffers if one.kind == "temporary")
    assert (product.name, product.type, product.bytes) == (
        "dot_general", "f32[64@data,512]", 16 * 512 * 4,
    )  # fmt: skip
    assert re.search(r"test_memory\.py:\d+$", product.source)


def test_what_lives_before_a_result_is_written_may_lie_in_its_memory() -> None:
    """One of two values that meet, in the place of the large result that is made of them."""

    def chain(x: Any) -> Any:
        h = jnp.cumsum(jnp.cumsum(x, 0), 1)
        return jnp.tile(jnp.sum(h), (128, 128))

    found = memory(planned(chain, shape(64, 64)).program, (False,), STORAGE["cpu"])
    assert found.output_bytes == 4 * 128 * 128
    assert found.peak_bytes - found.argument_bytes - found.output_bytes < 2 * 4 * 64 * 64


def test_partial_gradients_of_one_weight_are_added_up_one_by_one() -> None:
    def loss(w: Any, x: Any) -> Any:
        for _ in range(6):
            x = jnp.tanh(x @ w)
        return jnp.sum(x)

    plan = planned(jax.grad(loss), shape(512, 512), shape(8, 512))
    found = memory(plan.program, (False, False), STORAGE["tpu"])
    gradient = 4 * 512 * 512
    assert found.peak_bytes < 3.5 * gradient  # the weight, its gradient, one summand


# ----------------------------------------------------------------------------- what always holds

DRAWN = hypothesis.settings(max_examples=12)


def drawn_plan(drawn: DrawnProgram) -> gspmd.Plan:
    how: Mapping[str, Any] = {"in_specs": drawn.in_specs, "out_specs": drawn.out_specs}
    return gspmd.plan(drawn, *drawn.args, mesh=drawn.mesh, **how)


@DRAWN
@hypothesis.given(programs(steps=10))
def test_the_peak_lies_between_what_one_fusion_needs_and_what_all_make(
    drawn: DrawnProgram,
) -> None:
    program = drawn_plan(drawn).program
    kept = (False,) * len(program.ins)
    for storage in STORAGE.values():
        found = memory(program, kept, storage)
        laid = lay_out(program, kept, storage)
        live = found.peak_bytes - found.argument_bytes - found.output_bytes
        assert 0 <= live <= found.temporary_bytes + 1e-6
        made = [b for b in laid.blocks if not b.fixed and b.end < FOREVER]
        most = max((b.bytes for b in made), default=0)  # if it is not in a result's memory
        assert most <= live + found.output_bytes
        assert live <= sum(b.bytes for b in made)
        assert sum(one.bytes for one in found.buffers) == pytest.approx(found.peak_bytes)
        given = memory(program, (True,) * len(program.ins), storage)
        assert given.output_bytes <= found.output_bytes
        assert given.argument_bytes == found.argument_bytes


@DRAWN
@hypothesis.given(programs(steps=10))
def test_each_fusion_runs_once_and_after_those_that_it_reads_from(drawn: DrawnProgram) -> None:
    program = simplified(drawn_plan(drawn).program)
    footprint = Footprint.of(program, TPU)
    for one, found in order(program, footprint.size, footprint.scratch).items():
        assert sorted(map(hash, found.fusions)) == sorted(map(hash, fuse(one)))
        stored = {*one.ins, *(value for value, _ in one.consts)}
        for fusion in found.fusions:
            assert set(fusion.reads) <= stored
            stored.update(fusion.writes)


@hypothesis.settings(max_examples=6)
@hypothesis.given(programs(steps=5, mesh={"x": 1}))
def test_a_simplified_program_computes_the_same(drawn: DrawnProgram) -> None:
    plan = drawn_plan(drawn)
    if any(op.name in ("all_reduce", "shard_map") for op, _ in plan.program.walk()):
        return
    args = plan.flatten(tuple(drawn.args), {})
    right, found = (
        evaluate(program, args, "cpu") for program in (plan.program, simplified(plan.program))
    )
    for x, y in zip(found, right, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


BLOCKS = st.lists(
    st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(1, 50)), max_size=12
)


@hypothesis.given(BLOCKS)
def test_placed_blocks_need_at_least_what_is_live_and_at_most_all(
    drawn: Sequence[tuple[int, int, int]],
) -> None:
    value = Value(0, (), np.dtype(np.float32))
    blocks = [Block(value, size, start, start + length) for start, length, size in drawn]
    times = range(50)
    live = max(sum(b.bytes for b in blocks if b.start <= t <= b.end) for t in times)
    assert placed(blocks, 0) == live
    assert live <= placed(blocks, 1) <= sum(b.bytes for b in blocks)
    assert placed(blocks, 16) % 16 == 0


def test_a_hole_that_is_too_small_stays_empty() -> None:
    value = Value(0, (), np.dtype(np.float32))
    first = Block(value, 10, 0, 1)
    kept = Block(value, 5, 1, 4)
    small = Block(value, 4, 2, 4)  # into the hole that `first` leaves
    large = Block(value, 8, 3, 4)  # the rest of it does not do
    assert placed([first, kept, small, large], 1) == 10 + 5 + 8


def test_an_empty_program_needs_nothing() -> None:
    assert memory(Program((), (), ()), (), TPU) == Memory(0, 0, 0, 0, ())


# -------------------------------------------------------------------------- the benchmark, and TPUs


def test_the_benchmark_prints_its_table() -> None:
    printed = run(BENCHMARKS / "memory.py", "--predict", "--only", "AdamW, state whole")
    assert re.search(r"^AdamW, state whole +1\.880 ", printed, re.MULTILINE)


@pytest.mark.exhaustive
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="the TPU compiler is missing")
def test_the_tpu_compiler_needs_as_much_for_a_transformer() -> None:
    printed = run(BENCHMARKS / "memory.py", "--only", "AdamW*", "query sequence", "2D experts")
    assert "met: live bytes within 15% in 4 of 4 cases" in printed
