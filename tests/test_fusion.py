"""Which values ever exist in memory: what is merged, what is not, and that nothing is lost."""

from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np

import gspmd
from gspmd.evaluate import evaluate
from gspmd.fusion import Fusion, fuse
from gspmd.ir import Program
from gspmd.testing import DrawnProgram, programs


def local(fn: Any, *shapes: tuple[int, ...]) -> Program:
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return gspmd.plan(fn, *args, mesh={"x": 1}).program


def merged(fn: Any, *shapes: tuple[int, ...]) -> list[str]:
    """The names of the ops of each fusion."""
    return [" ".join(op.name for op in fusion.ops) for fusion in fuse(local(fn, *shapes))]


def test_a_chain_of_elementwise_ops_is_one() -> None:
    assert merged(lambda x: jnp.sin(x) * 2 + 1, (8, 8)) == ["sin mul add"]


def test_what_follows_a_product_is_done_on_its_way_out() -> None:
    assert merged(lambda x, w: jnp.tanh(x @ w), (8, 4), (4, 8)) == ["dot_general tanh"]


def test_what_leads_to_a_product_is_done_on_its_way_in() -> None:
    assert merged(lambda x, w: jnp.tanh(x) @ w, (8, 4), (4, 8)) == ["tanh dot_general"]


def test_two_products_are_two() -> None:
    def mlp(x: Any, up: Any, down: Any) -> Any:
        return jnp.tanh(x @ up) @ down

    assert merged(mlp, (8, 4), (4, 16), (16, 4)) == ["dot_general", "tanh dot_general"]


def test_of_two_products_that_meet_one_is_merged() -> None:
    def gated(x: Any, gate: Any, up: Any) -> Any:
        return (x @ gate) * (x @ up)

    assert merged(gated, (8, 4), (4, 16), (4, 16)) == ["dot_general", "dot_general mul"]


def test_what_is_cheap_is_computed_for_each_reader() -> None:
    def two(x: Any) -> Any:
        y = x + 1
        return jnp.sum(y), jnp.max(y)

    assert merged(two, (8, 8)) == ["add reduce_sum", "add reduce_max"]


def test_what_is_costly_is_computed_once_for_all_that_it_is_broadcast_to() -> None:
    def spread(x: Any) -> Any:
        return jax.lax.broadcast_in_dim(jnp.exp(x), (8, 8), (0,)) * 2

    assert merged(spread, (8,)) == ["exp", "broadcast_in_dim mul"]


def test_a_reduction_ends_a_fusion() -> None:
    assert merged(lambda x: x - jnp.max(x), (8, 8)) == ["reduce_max", "sub"]


def test_a_sort_stands_alone() -> None:
    assert merged(lambda x: jnp.sort(x + 1) * 2, (8,)) == ["add", "sort", "mul"]


def test_a_loop_stands_alone() -> None:
    def loop(x: Any) -> Any:
        return jax.lax.scan(lambda c, _: (jnp.sin(c) + 1, None), x * 2, None, length=3)[0] + 1

    names = merged(loop, (8,))
    assert names == ["mul", "scan", "add"]


@hypothesis.settings(max_examples=25)
@hypothesis.given(programs(steps=8))
def test_a_fusion_reads_only_what_is_stored_before_it(drawn: DrawnProgram) -> None:
    program = _plan(drawn).program
    stored = {*program.ins, *(value for value, _ in program.consts)}
    for fusion in fuse(program):
        assert set(fusion.reads) <= stored
        stored.update(fusion.writes)
    assert {x for x in program.outs if hasattr(x, "id")} <= stored


@hypothesis.settings(max_examples=10)
@hypothesis.given(programs(steps=6))
def test_fusions_compute_what_the_program_computes(drawn: DrawnProgram) -> None:
    """Each as a program of its own, from what it reads to what it writes."""
    plan = _plan(drawn, {"x": 1})
    args = plan.flatten(tuple(drawn.args), {})
    if any(op.name in ("all_reduce", "shard_map") for op, _ in plan.program.walk()):
        return
    values = dict(zip(plan.program.ins, args, strict=True)) | dict(plan.program.consts)
    for fusion in fuse(plan.program):
        piece = Program(fusion.reads, fusion.ops, fusion.writes)
        found = evaluate(piece, [values[v] for v in fusion.reads], "cpu")
        values.update(zip(fusion.writes, found, strict=True))
    want = evaluate(plan.program, args, "cpu")
    for x, right in zip(plan.program.outs, want, strict=True):
        if x in values:
            np.testing.assert_allclose(np.asarray(values[x]), np.asarray(right), rtol=1e-5)


def _plan(drawn: DrawnProgram, mesh: Any = None) -> gspmd.Plan:
    given = {} if mesh else {"in_specs": drawn.in_specs, "out_specs": drawn.out_specs}
    return gspmd.plan(drawn, *drawn.args, mesh=mesh or drawn.mesh, **given)


def test_the_root_names_a_fusion() -> None:
    (fusion,) = fuse(local(lambda x: jnp.sin(x) * 2, (8,)))
    assert isinstance(fusion, Fusion)
    assert fusion.root.name == "mul"


def test_fused_gelu_stores_two_of_its_values() -> None:
    """x @ gate goes to memory, for it is read twice and costs much; all else of GELU does not."""

    def mlp(x: Any, gate: Any, up: Any, down: Any) -> Any:
        return (jax.nn.gelu(x @ gate) * (x @ up)) @ down

    program = local(mlp, (16, 8), (8, 32), (8, 32), (32, 8))
    writes = [v.type for fusion in fuse(program) for v in fusion.writes]
    assert writes == ["f32[16,32]", "f32[16,32]", "f32[16,8]"]
