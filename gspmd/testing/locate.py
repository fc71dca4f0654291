"""first_difference: which value of a partitioned program is the first that is wrong.

The local program is run once more with every value that is a shard of one of the model's as an
output. What the devices hold is put together (joined along split dims, reduced where sums are
owed), and compared to the model's value, in program order.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from gspmd import run
from gspmd.evaluate import evaluate
from gspmd.ir import COLLECTIVES, Layout, Op, Operand, Value
from gspmd.plan import Plan
from gspmd.rules import factor_rule, op_rule
from gspmd.rules.control import CONTROL
from gspmd.sharding import Mesh, show_axes
from gspmd.testing.compare import Tolerance, difference

_REDUCE: dict[str, Any] = {
    "sum": np.sum, "prod": np.prod, "max": np.max, "min": np.min,
    "and": np.bitwise_and.reduce, "or": np.bitwise_or.reduce, "xor": np.bitwise_xor.reduce,
}  # fmt: skip


def first_difference(made: Plan, leaves: Sequence[Any], tolerance: Tolerance, on: str) -> str:
    """A sentence that names the first value of `made` that differs from the model's.

    `leaves` are the flat arguments, `on` where to run: "simulated" or "devices". Values inside of
    loops and branches are not looked at: the loop is named.
    """
    probes = _probes(made)
    wanted = {probe.of: None for probe in probes}
    whole = dataclasses.replace(made.model, outs=tuple(wanted))
    local = dataclasses.replace(made.program, outs=tuple(probe.out for probe in probes))
    args = map(run.on_one_device, leaves, whole.ins)
    arrays = jax.jit(lambda *xs: evaluate(whole, xs, "simulated"))(*args)
    expected = dict(zip(wanted, arrays, strict=True))
    if on == "simulated":
        held = run.stacked(local, made.mesh, leaves, poison=True)
    else:
        held = dataclasses.replace(made.executable, program=local).stacked(*leaves)
    for probe, shards in zip(probes, held, strict=True):
        got = run.join(*_reduced(shards, probe.at, made.mesh))
        differ = difference(got, expected[probe.of], tolerance)
        if differ is not None:
            return f"The first value to differ is {probe}: {probe.out.type} {differ}."
    return (
        "Each value in between, looked at alone, is right within the tolerance: an error grows on "
        "the way, or what differs is how a compiler arranged the program."
    )


@dataclasses.dataclass(frozen=True)
class _Probe:
    """The value `out` of a local `op`: shards of the model's value `of`, which `maker` made."""

    op: Op
    out: Value
    at: Layout
    of: Value
    maker: Op | None

    def __str__(self) -> str:
        """`the result of dot_general at model.py:9 (rule a b, b c -> a c  (b: sum))`."""
        if self.maker is None:
            called = f"argument {self.of}"
        else:
            at = f" at {self.maker.source}" if self.maker.source else ""
            called = f"the result of {self.maker.name}{at}"
        if any(_of(x) == self.of.id for x in self.op.ins):
            axes = self.op.params.get("axes") or self.op.params.get("src")
            over = f"[{show_axes(axes)}]" if self.op.name in COLLECTIVES and axes else ""
            return f"what {self.op.name}{over} makes of {called}"
        if self.maker is None or self.maker.name == "constraint":
            return called
        if self.maker.name in CONTROL:
            return f"{called} (values inside of it were not looked at)"
        if op_rule(self.maker) is None:
            return f"{called} (which has no rule)"
        return f"{called} (rule {factor_rule(self.maker)})"


def _probes(made: Plan) -> list[_Probe]:
    """The values of the local program that are shards of the model's, in program order."""
    makers: dict[int, tuple[Value, Op | None]] = {v.id: (v, None) for v in made.model.ins}
    makers |= {out.id: (out, op) for op in made.model.ops for out in op.outs}
    return [
        _Probe(op, out, out.layout, *makers[out.layout.of])
        for op in made.program.ops
        for out in op.outs
        if out.layout is not None and out.layout.of in makers
    ]


def _of(x: Operand) -> int | None:
    return x.layout.of if isinstance(x, Value) and x.layout is not None else None


def _reduced(shards: jax.Array, at: Layout, mesh: Mesh) -> tuple[Any, Layout, Mesh]:
    """The arguments of `run.join`, with the sums that are owed paid."""
    if not at.sharding.partial:
        return shards, at, mesh
    dims = tuple(mesh.names.index(axis) for axis in at.sharding.partial)
    array = np.asarray(shards)
    array = _REDUCE[at.sharding.reduction](array, axis=dims, keepdims=True).astype(array.dtype)
    ones = Mesh(tuple((n, 1 if n in at.sharding.partial else k) for n, k in mesh.axes))
    return array, Layout(at.shape, at.sharding.whole), ones
