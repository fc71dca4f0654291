"""The benchmarks run, and count what XLA sends as the plan counts what it sends itself."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_examples import run

import gspmd

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def hlo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hlo", BENCHMARKS / "hlo.py")
    assert spec
    assert spec.loader
    module = sys.modules["hlo"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plan_time_prints_its_tables() -> None:
    printed = run(BENCHMARKS / "plan_time.py", "--quick")
    for row in ("first in the process", "2x4", "32x64", "trace", "partition", "ops of the program"):
        assert row in printed
    assert re.search(r"^CPU devices, 2x4 .* (met|MISSED)", printed, re.MULTILINE)


def test_hlo_of_our_program_sends_what_was_planned(hlo: ModuleType) -> None:
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


def test_hlo_of_a_jitted_program(hlo: ModuleType) -> None:
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


def test_hlo_of_a_tpu_program(hlo: ModuleType) -> None:
    found = [(s.kind, s.group, s.trips, s.bytes) for s in hlo.collectives(TPU)]
    assert found == [
        ("all-gather", 4, 7, 3 / 4 * 16 * 64 * 2),
        ("reduce-scatter", 16, 7, 15 / 16 * 64 * 32 * 2),
        ("collective-permute", 2, 1, 20),
    ]


def test_what_cannot_be_counted_is_an_error(hlo: ModuleType) -> None:
    with pytest.raises(ValueError, match="trip count is not to be seen"):
        hlo.collectives(TPU.replace("constant(7)", "add(%a, %b)"))
    with pytest.raises(ValueError, match="devices that take part are not to be seen"):
        hlo.collectives(TPU.replace("replica_groups=[4,16]<=[64]", "replica_groups={}"))
