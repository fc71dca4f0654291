"""How long planning takes: on meshes of any size, by pass, unrolled, and beside XLA's compiler.

The subject is the GSPMD paper's dense 137B training step: 64 layers, remat, bfloat16 products,
float32 weights, AdamW, 2D finalized sharding, 256 sequences of 1024 tokens. Nothing is executed, so
no devices are needed. XLA compiles the same traced program with the same annotations, written as
`with_sharding_constraint`: for CPU devices, and by the TPU compiler where libtpu is installed.

    python benchmarks/plan_time.py [--quick] [--only meshes|passes|xla]

Planning runs on one thread, so that its CPU seconds are what it takes on an idle machine: targets
speak of these. XLA's compiler uses all cores: beside it, both are wall seconds. On CPU devices XLA
sends bfloat16 sums as float32, so that both programs send more than was planned.
"""

import argparse
import dataclasses
import functools
import gc
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from devices import TOPOLOGY, devices_mesh
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from table import Table, show

import gspmd
from gspmd import hlo
from gspmd.evaluate import evaluate
from gspmd.ir import Op, Program
from gspmd.models import training, transformer

MESHES = ({"data": 2, "model": 4}, {"data": 16, "model": 64}, {"data": 32, "model": 64})
POD = MESHES[1]
CONFIG = transformer.CONFIGS["137b"]
SMALL = dataclasses.replace(
    CONFIG, layers=2, vocab=512, model_dim=512, hidden_dim=1024, heads=64, head_dim=16, seq=64
)
# As for a program whose collectives are to be counted: each one apart.
COMPILER_OPTIONS = {"tpu": {"xla_tpu_enable_async_collective_fusion": False}}
# For a trial run of this script only.
QUICK_OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Step(NamedTuple):
    """A training step and what it is called with."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]


def step_of(config: transformer.Config) -> Step:
    """The AdamW training step of `config`, on shapes."""
    optimizer = training.make_optimizer(training.TrainConfig())

    def init() -> training.State:
        return training.init_state(functools.partial(transformer.init, config), optimizer, 0)

    def loss(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        return transformer.loss(config, params, batch)

    tokens = jax.ShapeDtypeStruct((256, config.seq), jnp.int32)
    args = (jax.eval_shape(init), {"inputs": tokens, "targets": tokens})
    return Step(training.make_step(loss, optimizer, 0), args)


def plan(step: Step, mesh: Mapping[str, int]) -> gspmd.Plan:
    return gspmd.plan(
        step.fn,
        *step.args,
        mesh=mesh,
        in_specs=(None, P("batch")),
        rules=transformer.rules_for("2d", tuple(mesh)),
        donate_argnums=0,
    )


class Timed(NamedTuple):
    """A plan, with the seconds from the function to its local program."""

    wall: float
    cpu: float
    plan: gspmd.Plan


def timed(step: Step, mesh: Mapping[str, int]) -> Timed:
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    made = plan(step, mesh)
    return Timed(time.perf_counter() - wall, time.process_time() - cpu, made)


# --------------------------------------------------------------------------------------- the tables


def meshes(config: transformer.Config, repeats: int) -> Table:
    """Planning time by mesh: it must not depend on the number of devices."""
    step = step_of(config)
    cold = timed(step, POD)
    runs: dict[str, list[Timed]] = {_name(mesh): [] for mesh in MESHES}
    for _ in range(repeats):  # interleaved, so that a busy moment of the machine hits all alike
        for mesh in MESHES:
            runs[_name(mesh)].append(timed(step, mesh))
    cpu = {name: min(run.cpu for run in of_mesh) for name, of_mesh in runs.items()}
    rows = [["16x64, first in the process", *_seconds(cold), "", "", "<= 2 s", _met(cold.cpu <= 2)]]
    for name, of_mesh in runs.items():
        best = min(of_mesh)
        ratio = cpu[name] / cpu[_name(POD)]
        target = ("<= 2 s", cpu[name] <= 2) if ratio == 1 else ("within 10 %", ratio <= 1.1)
        sent = f"{best.plan.wire_bytes / 1e9:.4g}"
        cells = [f"{best.wall:.3f}", f"{cpu[name]:.3f}", f"{ratio:.2f}", sent]
        rows.append([name, *cells, target[0], _met(target[1])])
    title = f"Planning {_layers(config)}, scanned: best of {repeats}, interleaved"
    return Table(title, ("mesh", "seconds", "CPU s", "to 16x64", "GB sent", "target", ""), rows)


def _seconds(run: Timed) -> list[str]:
    return [f"{run.wall:.3f}", f"{run.cpu:.3f}"]


def passes(config: transformer.Config, repeats: int) -> Table:
    """Where the time goes, with the layers in a loop and one after another."""
    sizes = (config, dataclasses.replace(config, scan=False))
    best = [min(timed(step, POD) for _ in range(repeats)) for step in map(step_of, sizes)]
    rows: list[list[str]] = []
    for name in best[0].plan.seconds:
        cells = [name]
        for run in best:
            took = run.plan.seconds[name]
            cells += [f"{took:.3f}", f"{took / run.wall:.0%}"]
        rows.append([*cells, "", ""])
    scanned, unrolled = best
    wall = [f"{scanned.wall:.3f}", "", f"{unrolled.wall:.3f}", ""]
    rows.append(["together", *wall, "", ""])
    cpu = [f"{scanned.cpu:.3f}", "", f"{unrolled.cpu:.3f}", ""]
    rows.append(["CPU seconds", *cpu, "unrolled <= 20 s", _met(unrolled.cpu <= 20)])
    counts = [sum(1 for _ in run.plan.model.walk()) for run in best]
    rows.append(["ops of the program", f"{counts[0]:,}", "", f"{counts[1]:,}", "", "", ""])
    each = [f"{run.cpu / n * 1e6:.0f}" for run, n in zip(best, counts, strict=True)]
    rows.append(["CPU microseconds an op", each[0], "", each[1], "", "", ""])
    title = f"Planning {_layers(config)} on 16x64 by pass: best of {repeats}"
    return Table(title, ("pass", "scanned s", "", "unrolled s", "", "target", ""), rows)


def against_xla(config: transformer.Config) -> Table:
    """Planning next to XLA's compilation of the same annotated step, and what each sends."""
    sides = {"CPU devices, 2x4": ("cpu", MESHES[0])}
    if importlib.util.find_spec("libtpu") and config == CONFIG:
        sides[f"TPU {TOPOLOGY}, 16x64"] = ("tpu", POD)
    rows: list[list[str]] = []
    for name, (platform, mesh) in sides.items():
        took = _in_subprocess(platform, mesh, config == SMALL)
        ratio = took["plan"] / took["xla"]
        cells = [f"{took[key]:.2f}" for key in ("plan", "xla", "ours")]
        cells += [f"{ratio:.3f}", *(f"{took[key]:.4g}" for key in ("xla_gb", "ours_gb", "plan_gb"))]
        rows.append([name, *cells, "<= 0.33", _met(ratio <= 1 / 3)])
    if not importlib.util.find_spec("libtpu"):
        rows.append(["TPU", *[""] * 8, "libtpu is not installed"])
    title = f"Planning {_layers(config)}, scanned, and what XLA takes (seconds) and sends (GB)"
    columns = (
        "back end", "plan s", "XLA s", "of our program", "plan / XLA",
        "XLA GB", "ours GB", "planned GB", "target", "",
    )  # fmt: skip
    return Table(title, columns, rows)


def _met(met: bool) -> str:
    return "met" if met else "MISSED"


def _layers(config: transformer.Config) -> str:
    return "137B" if config == CONFIG else f"{config.layers} small layers"


def _name(mesh: Mapping[str, int]) -> str:
    return "x".join(map(str, mesh.values()))


# -------------------------------------------------------------------------------------- XLA's side


def constrained(program: Program, mesh: Mesh) -> Program:
    """The traced program, each annotation of it a `with_sharding_constraint`."""

    def convert(op: Op) -> Op:
        if op.name == "constraint":
            spec = P(*(P.UNCONSTRAINED if axes is None else axes for axes in op.params["dims"]))
            sharding = NamedSharding(mesh, spec)
            return dataclasses.replace(op, call=functools.partial(_constrain, sharding))
        bodies = tuple(constrained(body, mesh) for body in op.bodies)
        return dataclasses.replace(op, bodies=bodies)

    return dataclasses.replace(program, ops=tuple(map(convert, program.ops)))


def _constrain(sharding: NamedSharding, x: jax.Array, **_: Any) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, sharding)


def lower_for_xla(made: gspmd.Plan, devices: Mesh) -> jax.stages.Lowered:
    """What `made` was planned from, for XLA to partition: the batch is split, the rest is open."""
    program = constrained(made.traced.program, devices)

    def model(*flat: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(evaluate(program, flat, "cpu"))

    given = [value.name.startswith("batch") for value in program.ins]
    shardings = tuple(
        NamedSharding(devices, spec) if fixed else None
        for spec, fixed in zip(made.flat_specs[0], given, strict=True)
    )
    donated = tuple(i for i, donated in enumerate(made.traced.donated) if donated)
    shapes = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in program.ins]
    return jax.jit(model, in_shardings=shardings, donate_argnums=donated).lower(*shapes)


def compile_times(platform: str, mesh: Mapping[str, int], small: bool) -> dict[str, float]:
    """Seconds for a warm plan, XLA's compilation, and that of our program; GB that each sends."""
    step = step_of(SMALL if small else CONFIG)
    plan(step, mesh)
    run = timed(step, mesh)
    devices = devices_mesh(platform, mesh)
    options = QUICK_OPTIONS if small else COMPILER_OPTIONS.get(platform)
    lowered = lower_for_xla(run.plan, devices)
    began = time.perf_counter()
    theirs = lowered.compile(options)
    xla = time.perf_counter() - began
    began = time.perf_counter()
    ours = run.plan.compile(devices, options)
    return {
        "plan": run.wall,
        "xla": xla,
        "ours": time.perf_counter() - began,
        "xla_gb": hlo.gigabytes(theirs.as_text() or "")["together"],
        "ours_gb": hlo.gigabytes(ours.as_text() or "")["together"],
        "plan_gb": run.plan.wire_bytes / 1e9,
    }


def _in_subprocess(platform: str, mesh: Mapping[str, int], small: bool) -> dict[str, float]:
    """`compile_times` in a process of its own, which has the devices."""
    count = math.prod(mesh.values())
    environment = dict(os.environ, JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1")
    if platform == "cpu":
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"
    command = [sys.executable, __file__, "--compile", platform, "--mesh", json.dumps(mesh)]
    done = subprocess.run(
        command + ["--quick"] * small, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--only", choices=("meshes", "passes", "xla"), help="one table")
    parser.add_argument("--compile", choices=("cpu", "tpu"), help=argparse.SUPPRESS)
    parser.add_argument("--mesh", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    if given.compile:
        print(json.dumps(compile_times(given.compile, given.mesh, given.quick)))
        return
    config, repeats = (SMALL, 1) if given.quick else (CONFIG, 7)
    if given.only in (None, "meshes"):
        show(meshes(config, repeats))
    if given.only in (None, "passes"):
        show(passes(config, min(repeats, 3)))
    if given.only in (None, "xla"):
        show(against_xla(config))


if __name__ == "__main__":
    main()
