"""The benchmarks run, and count what XLA sends as the plan counts what it sends itself."""

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import tree_util
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from processes import run

import gspmd
from gspmd import hlo

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


class Scripts:
    """The modules of benchmarks/, which find each other as scripts do: `scripts.hlo`."""

    def __getattr__(self, name: str) -> ModuleType:
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def scripts() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield Scripts()


@pytest.mark.exhaustive
def test_plan_time_prints_its_tables() -> None:
    printed = run(BENCHMARKS / "plan_time.py", "--quick")
    for row in ("first in the process", "2x4", "32x64", "trace", "partition", "ops of the program"):
        assert row in printed
    assert re.search(r"^CPU devices, 2x4 .* (met|MISSED)", printed, re.MULTILINE)


@pytest.mark.exhaustive  # it measures the CPU first
def test_measured_utilization_stands_beside_the_predicted_one() -> None:
    printed = run(BENCHMARKS / "utilization_measured.py", "--quick")
    assert re.search(
        r"^1 device +(\d+\.\d+ +){5}\d\.\d+ x jax.jit, <= 1.02 ", printed, re.MULTILINE
    )
    assert re.search(r"^1 device, jax.jit +(\d+\.\d+ +){4}\d+\.\d+ *$", printed, re.MULTILINE)


def test_resharding_prints_its_tables() -> None:
    printed = run(BENCHMARKS / "resharding.py", "--quick", "--only", "2x2")
    rows = re.findall(r"^2x2, rank [23], (?:nothing|a sum) owed .* met *$", printed, re.MULTILINE)
    assert len(rows) == 4
    assert "reduce_scatter, collective_permute" in printed  # a way above the bound


def test_hlo_of_our_program_sends_what_was_planned() -> None:
    """A scanned MLP: XLA adds nothing to the collectives of the plan, in loops or out of them."""

    def mlp(x: jax.Array, w: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        h = gspmd.annotate(x @ w["up"], P("batch", "hidden"))
        return gspmd.annotate(jnp.tanh(h) @ w["down"], P("batch", "model")), None

    def run_layers(x: jax.Array, w: dict[str, jax.Array]) -> jax.Array:
        return jax.lax.scan(mlp, x, w)[0]

    shape = jax.ShapeDtypeStruct
    x = shape((16, 32), jnp.float32)
    w = {"up": shape((3, 32, 64), jnp.float32), "down": shape((3, 64, 32), jnp.float32)}
    mesh = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Auto,) * 2)
    plan = gspmd.plan(
        run_layers, x, w, mesh=mesh, in_specs=(P("batch", "model"), None),
        rules={"batch": "data", "hidden": "model", "model": "model"},
    )  # fmt: skip
    assert {c.trips for c in plan.collectives} == {3}
    text = plan.compile().as_text()
    assert hlo.gigabytes(text)["together"] == pytest.approx(plan.wire_bytes / 1e9)


def test_hlo_of_a_jitted_program() -> None:
    mesh = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Auto,) * 2)
    split, whole = NamedSharding(mesh, P(None, "model")), NamedSharding(mesh, P())
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    gather = jax.jit(lambda x: x, in_shardings=split, out_shardings=whole).lower(x).compile()
    (sent,) = hlo.collectives(gather.as_text())
    assert (sent.kind, sent.group, sent.trips) == ("all-gather", 4, 1)
    assert sent.bytes == 3 / 4 * 8 * 16 * 4


# The forms that the TPU compiler writes, as far as they differ.
TPU = """\
HloModule jit_step, entry_computation_layout={(bf16[16,64]{1,0})->bf16[16,64]{1,0}}

%all-reduce-scatter.1 (input: bf16[64,32]) -> bf16[4,32] {
  %input = bf16[64,32]{1,0} parameter(0)
  %all-reduce.5 = bf16[64,32]{1,0} all-reduce(%input), replica_groups=[4,16]<=[64], to_apply=%add
  ROOT %slice = bf16[4,32]{1,0} dynamic-slice(%all-reduce.5), dynamic_slice_sizes={4,32}
}

%condition (state: (s32[], bf16[16,64])) -> pred[] {
  %bound = s32[]{:T(128)} constant(7)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%body (state: (s32[], bf16[16,64])) -> (s32[], bf16[16,64]) {
  %g = bf16[16,64]{1,0:T(8,128)(2,1)} all-gather(%x), replica_groups=mesh['axis_0'=2,'axis_1'=4], \
device_ids=([4,2]T(1,0)) {'axis_1'}, dimensions={1}
  %f = bf16[4,32]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
}

ENTRY %main (x: bf16[16,64]) -> bf16[16,64] {
  %w = (s32[], bf16[16,64]{1,0}) while(%t), condition=%condition, body=%body
  %p = bf16[10]{0} collective-permute(%z), source_target_pairs={{0,1},{1,0}}
}
"""


def test_hlo_of_a_tpu_program() -> None:
    found = [(s.kind, s.group, s.trips, s.bytes) for s in hlo.collectives(TPU)]
    assert found == [
        ("all-gather", 4, 7, 3 / 4 * 16 * 64 * 2),
        ("reduce-scatter", 16, 7, 15 / 16 * 64 * 32 * 2),
        ("collective-permute", 2, 1, 20),
    ]


def test_what_cannot_be_counted_is_an_error() -> None:
    with pytest.raises(ValueError, match="trip count is not to be seen"):
        hlo.collectives(TPU.replace("constant(7)", "add(%a, %b)"))
    with pytest.raises(ValueError, match="devices that take part are not to be seen"):
        hlo.collectives(TPU.replace("replica_groups=[4,16]<=[64]", "replica_groups={}"))


# As XLA writes it on CPU, for a module of 8 partitions.
CPU = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={()->f32[4]{0}}, num_partitions=8

%left (p: f32[4]) -> f32[4] {
  ROOT %l = f32[4]{0} all-reduce(%p), replica_groups={}, to_apply=%add
}

%right (p: f32[4]) -> f32[4] {
  ROOT %r = f32[4]{0} collective-permute(%p), source_target_pairs={{0,0},{1,1},{2,2}}
}

%draw (s: (u32[], f32[4])) -> (u32[], f32[4]) {
  ROOT %t = (u32[], f32[4]{0}) tuple(%a, %b)
}

%until (s: (u32[], f32[4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%settled (s: (s32[], f32[4])) -> pred[] {
  %any = f32[1]{0} all-reduce(%q), replica_groups=[2,4]<=[8], to_apply=%add
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %c = f32[4]{0} conditional(%i, %x, %x), branch_computations={%left, %right, %left}
  %d = f32[4]{0} conditional(%p, %x, %x), true_computation=%left, false_computation=%right
  %w = (u32[], f32[4]{0}) while(%t), condition=%until, body=%draw
  %v = (s32[], f32[4]{0}) while(%t), condition=%settled, body=%draw, \
backend_config={"known_trip_count":{"n":"5"}}
  %h = f32[4]{0} collective-permute(%x), source_target_pairs={{0,1},{1,2},{2,3}}
}
"""


def test_hlo_of_a_cpu_program() -> None:
    """All branches count, conditions too, and a loop that sends nothing may run as it likes."""
    found = [(s.kind, s.group, s.trips, s.bytes) for s in hlo.collectives(CPU)]
    reduced, stays = ("all-reduce", 8, 1, 2 * 7 / 8 * 16), ("collective-permute", 1, 1, 0)
    assert found == [
        *(reduced, stays, reduced),
        *(reduced, stays),
        ("all-reduce", 4, 5, 2 * 3 / 4 * 4),
        ("collective-permute", 2, 1, 16),
    ]


# ------------------------------------------------------------------------------ ops_against_xla.py


@pytest.mark.exhaustive
def test_ops_against_xla_prints_its_table(scripts: Any) -> None:
    printed = run(BENCHMARKS / "ops_against_xla.py", "--quick")
    groups = {case.group for case in scripts.op_cases.cases()}
    for group in groups:
        assert re.search(rf"^{re.escape(group)}  +\S.*  [\d,]+ ", printed, re.MULTILINE), group
    # XLA does not compile the reduction by a user's function.
    assert f"\nmet: above XLA's bytes: 0 of {len(groups) - 1} cases\n" in printed
    assert "met: failed or wrong, ours: 0\n" in printed
    assert re.search(r"^fft +batch +0 +0 +1,835,008 +0 ", printed, re.MULTILINE)


def test_the_types_of_every_case_are_those_of_its_function(scripts: Any) -> None:
    seen: set[tuple[str, str]] = set()
    for case in scripts.op_cases.cases():
        ins = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in case.ins]
        outs = tree_util.tree_leaves(jax.eval_shape(case.fn, *ins))
        stated = [(x.shape, x.dtype) for x in case.outs]
        assert [(x.shape, x.dtype) for x in outs] == stated, (case.group, case.name)
        assert any(axes for x in (*case.ins, *case.outs) for axes in x.dims), (
            case.group,
            case.name,
        )
        seen.add((case.group, case.name))
    assert len(seen) == sum(1 for _ in scripts.op_cases.cases())


def test_a_case_reads_the_notation(scripts: Any) -> None:
    Case, Tensor = scripts.op_case.Case, scripts.op_case.Tensor
    case = Case("", "", jnp.sort, "f32[8@(x,y),3], i32[] -> bool[7@y]")
    assert case.mesh == {"x": 4, "y": 2}
    assert case.ins == (
        Tensor(np.dtype(np.float32), (8, 3), (("x", "y"), ())),
        Tensor(np.dtype(np.int32), (), ()),
    )
    assert case.ins[0].spec == P(("x", "y"), None)
    assert case.outs == (Tensor(np.dtype(np.bool_), (7,), (("y",),)),)
    assert case.outs[0].padded(case.mesh) == (8,)
    assert Case("", "", jnp.sort, "f32[8@x] -> f32[8@x]").mesh == {"x": 8}


def test_the_verdict_names_what_speaks_against_us(scripts: Any) -> None:
    Case, Row = scripts.op_case.Case, scripts.ops_against_xla.Row
    case = lambda name, named=False: Case("sort", name, jnp.sort, "f32[8@x] -> f32[8@x]", named)  # noqa: E731
    measured = [
        (case("equal"), Row(planned=8.0, ours=8.0, theirs=8.0, time=0.5)),
        (case("more"), Row(planned=8.0, ours=9.0, theirs=0.0, time=2.0)),
        (case("near", True), Row(planned=3.0, ours=3.0, theirs=8.0, time=1.0)),
        (case("far", True), Row(planned=2.0, ours=2.0, theirs=8.0)),
        (case("ours breaks"), Row(planned=1.0, theirs=8.0, notes=["gspmd: TypeError: no"])),
        (case("theirs is wrong"), Row(planned=1.0, ours=1.0, theirs=8.0, wrong=["XLA"])),
    ]
    assert scripts.ops_against_xla.verdict(measured) == [
        "MISSED: above XLA's bytes: 1 of 5 cases\n  sort: more",
        "MISSED: neither zero nor 4 times below XLA: 1 of 2 named cases\n  sort: near",
        "MISSED: sent more than was planned: 1\n  sort: more",
        "MISSED: failed or wrong, ours: 1\n  sort: ours breaks",
        "failed or wrong, XLA's: 1\n  sort: theirs is wrong",
        "run time: 1.00 of XLA's in the middle; more than 1.25 in 1 cases\n  sort: more (2.0)",
    ]
    rows = scripts.ops_against_xla.table(measured).rows
    assert [row[5] for row in rows] == ["1", "more", "0.38", "0.25", "", "0.12"]
    assert rows[4][2:5] == ["1", "failed", "8"]
    assert rows[4][-1] == "gspmd: TypeError: no"


DIES = """
import os, signal, sys, worker

def measure(number, skip):
    if number == 1 and "dies" not in skip:
        worker.doing("dies", "compiling")
        print("F1122 20:34:37 1 some.cc:7] Check failed: a == b", file=sys.stderr, flush=True)
        os.abort()
    if number == 2 and "hangs" not in skip:
        worker.doing("hangs", "running")
        signal.raise_signal(signal.SIGALRM)
    if number == 3:
        raise ValueError("not to be measured")
    return {"square": number ** 2}

worker.work(measure)
"""


def test_what_a_measurement_dies_of_is_left_out_and_told(scripts: Any) -> None:
    command, environment = [sys.executable, "-c", DIES], {"PYTHONPATH": str(BENCHMARKS)}
    measured = scripts.worker.measure_all(command, environment, [0, 1, 2, 4])
    assert {i: found["square"] for i, (found, _) in measured.items()} == {0: 0, 1: 1, 2: 4, 4: 16}
    assert {i: died for i, (_, died) in measured.items() if died} == {
        1: {"dies": "compiling, the process dies: Check failed: a == b"},
        2: {"hangs": "running, more than 180 s"},
    }
    with pytest.raises(SystemExit, match=r"measuring 3 fails .* ValueError: not to be measured"):
        scripts.worker.measure_all(command, environment, [0, 3, 4])


# ------------------------------------------------------------------------------------ headline.py


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu")
@pytest.mark.exhaustive
def test_a_run_is_told_as_planned_and_as_compiled(scripts: Any) -> None:
    small = scripts.published.Run(
        "small", "", "tpu-v5e:2x4", "glam", "tiny", {"data": 4, "model": 2}, 16, "expert_2d"
    )
    told = scripts.headline.describe(small)
    assert told.startswith("small by expert_2d on data=4, model=2, tpu-v5e:2x4\nplanned:  0.0")
    assert re.search(r"^compiled: 0\.\d+ GB sent .*\nkept: \d+, 0\.0", told, re.MULTILINE)
    assert "all_to_all over 4: " in told
