"""A compiled program beside its plan: collectives kept, added and removed."""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import gspmd
from gspmd import P
from gspmd.compiled import Sent
from gspmd.hlo import collectives


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def mlp(w: Any, x: Any) -> Any:
    def layer(x: Any, one: Any) -> tuple[Any, None]:
        up, down = one
        return gspmd.annotate(jnp.tanh(x @ up) @ down, P("data", None)), None

    return lax.scan(layer, x, w)[0]


ARGS = ((f32(5, 128, 512), f32(5, 512, 128)), f32(64, 128))
SPECS = ((P(None, None, "model"), P(None, "model", None)), P("data"))


def test_the_cpu_compiler_keeps_what_was_planned() -> None:
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    plan = gspmd.plan(mlp, *ARGS, mesh=mesh, in_specs=SPECS)
    found = plan.compare(plan.compile())
    # a device has 32 rows of 128 entries of 4 bytes; of 4 devices each sends 2 * 3/4 of that
    assert found.kept == (Sent("all_reduce", 4, 32 * 128 * 4 * 1.5, 5),)
    assert found.added == found.removed == ()
    assert found.wire_bytes == plan.wire_bytes
    assert found.argument_bytes == 4 * (2 * 5 * 128 * 512 / 4 + 64 * 128 / 2)
    assert found.peak_bytes >= found.argument_bytes + found.output_bytes


def test_what_another_program_sends_is_added() -> None:
    """Beside a plan whose weights are whole, all that the compiler sends is its own."""
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    split = gspmd.plan(mlp, *ARGS, mesh=mesh, in_specs=SPECS)
    whole = gspmd.plan(mlp, *ARGS, mesh=mesh, in_specs=(None, P("data")))
    found = whole.compare(split.compile())
    assert [one.kind for one in found.added] == ["all_reduce"]
    assert found.kept == found.removed == ()
    found = split.compare(whole.compile())
    assert [one.kind for one in found.removed] == ["all_reduce"]
    assert found.kept == found.added == ()
    assert "removed: 1, 0.000 GB\n  all_reduce over 4: 5 x 24,576 B" in str(found)


def test_what_other_cores_of_a_tpu_send_is_sent() -> None:
    """On TPU v7 the compiler has sparse cores run large collectives, as calls that it starts."""
    (found,) = collectives("""
HloModule jit_program, num_partitions=8

%called (p: bf16[64]) -> bf16[64] {
  %p = bf16[64]{0} parameter(0)
  ROOT %sum = bf16[64]{0} all-reduce(%p), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
}

ENTRY %main (x: bf16[64]) -> bf16[64] {
  %x = bf16[64]{0} parameter(0)
  %started = ((bf16[64]{0}), bf16[64]{0}) call-start(%x), to_apply=%called
  ROOT %done = bf16[64]{0} call-done(%started)
}
""")
    assert (found.kind, found.group, found.bytes, found.trips) == ("all-reduce", 2, 128, 1)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu")
def test_the_tpu_compiler_says_what_it_kept() -> None:
    plan = gspmd.plan(mlp, *ARGS, mesh={"data": 2, "model": 4}, in_specs=SPECS)
    found = plan.compare(plan.compile("tpu-v5e:2x4"))
    assert [(one.kind, one.group, one.trips) for one in found.kept] == [("all_reduce", 4, 5)]
    assert found.removed == ()
    assert found.peak_bytes > found.argument_bytes > 0
