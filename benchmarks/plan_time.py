"""How long planning takes: on meshes of any size, by pass, unrolled, and beside XLA's compiler.

The subject is the GSPMD paper's dense 137B training step: 64 layers, remat, bfloat16 products,
float32 weights, AdamW, 2D finalized sharding, 256 sequences of 1024 tokens. Nothing is executed, so
no devices are needed. XLA compiles the same traced program with the same annotations, written as
`with_sharding_constraint`: on CPU devices, and by the TPU compiler where libtpu is installed.

    python benchmarks/plan_time.py [--quick] [--only meshes|passes|xla]

Seconds depend on the machine; the ratios next to them are what the targets speak of.
"""

import argparse
import dataclasses
import functools
import gc
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import gspmd
from gspmd.evaluate import evaluate
from gspmd.ir import Op, Program
from gspmd.models import training, transformer

MESHES = ({"data": 2, "model": 4}, {"data": 16, "model": 64}, {"data": 32, "model": 64})
POD = MESHES[1]
TPU_TOPOLOGY = "v3:16x32"  # 1024 cores
CONFIG = transformer.CONFIGS["137b"]
SMALL = dataclasses.replace(
    CONFIG, layers=4, vocab=512, model_dim=512, hidden_dim=1024, heads=64, head_dim=16, seq=64
)


class Table(NamedTuple):
    """Rows of text under a title; the last column says whether a target is met."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


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


def timed(step: Step, mesh: Mapping[str, int]) -> tuple[float, gspmd.Plan]:
    """Seconds from the function to its local program, and the plan."""
    gc.collect()
    began = time.perf_counter()
    made = plan(step, mesh)
    return time.perf_counter() - began, made


# --------------------------------------------------------------------------------------- the tables


def meshes(config: transformer.Config, repeats: int) -> Table:
    """Planning time by mesh: it must not depend on the number of devices."""
    step = step_of(config)
    cold, _ = timed(step, POD)
    best = {_name(mesh): float("inf") for mesh in MESHES}
    wire: dict[str, float] = {}
    for _ in range(repeats):  # interleaved, so that a busy moment of the machine hits all alike
        for mesh in MESHES:
            seconds, made = timed(step, mesh)
            best[_name(mesh)] = min(best[_name(mesh)], seconds)
            wire[_name(mesh)] = made.wire_bytes
    rows = [_row("16x64, first in the process", cold, "<= 2 s", cold <= 2)]
    for name, seconds in best.items():
        ratio = seconds / best[_name(POD)]
        if name == _name(POD):
            rows.append(_row(name, seconds, "<= 2 s", seconds <= 2, "1.00", wire[name]))
        else:
            close = abs(ratio - 1) <= 0.1
            rows.append(_row(name, seconds, "within 10 %", close, f"{ratio:.2f}", wire[name]))
    title = f"Planning {_layers(config)}, scanned: best of {repeats}, interleaved"
    return Table(title, ("mesh", "seconds", "to 16x64", "GB sent", "target", ""), rows)


def _row(
    name: str, seconds: float, target: str, met: bool, ratio: str = "", wire: float | None = None
) -> list[str]:
    sent = "" if wire is None else f"{wire / 1e9:.4g}"
    return [name, f"{seconds:.3f}", ratio, sent, target, _met(met)]


def passes(config: transformer.Config, repeats: int) -> Table:
    """Where the time goes, with the layers in a loop and one after another."""
    configs = {
        "scanned": config,
        "unrolled": dataclasses.replace(config, scan=False),
    }
    best: dict[str, tuple[float, gspmd.Plan]] = {}
    for name, sizes in configs.items():
        step = step_of(sizes)
        runs = [timed(step, POD) for _ in range(repeats)]
        best[name] = min(runs, key=lambda run: run[0])
    rows: list[list[str]] = []
    for name in best["scanned"][1].seconds:
        cells = [name]
        for seconds, made in best.values():
            took = made.seconds[name]
            cells += [f"{took:.3f}", f"{took / seconds:.0%}"]
        rows.append([*cells, "", ""])
    total = best["unrolled"][0]
    together = ["together"]
    for seconds, _ in best.values():
        together += [f"{seconds:.3f}", ""]
    rows.append([*together, "unrolled <= 20 s", _met(total <= 20)])
    counts = [sum(1 for _ in made.model.walk()) for _, made in best.values()]
    rows.append(["ops of the program", f"{counts[0]:,}", "", f"{counts[1]:,}", "", "", ""])
    each = [seconds / n * 1e6 for (seconds, _), n in zip(best.values(), counts, strict=True)]
    rows.append(["microseconds an op", f"{each[0]:.0f}", "", f"{each[1]:.0f}", "", "", ""])
    title = f"Planning {_layers(config)} on 16x64 by pass: best of {repeats}"
    return Table(title, ("pass", "scanned s", "", "unrolled s", "", "target", ""), rows)


def against_xla(config: transformer.Config) -> Table:
    """Planning next to XLA's compilation of the same annotated step."""
    sides = {"CPU devices, 2x4": ("cpu", MESHES[0])}
    if importlib.util.find_spec("libtpu"):
        sides[f"TPU {TPU_TOPOLOGY}, 16x64"] = ("tpu", POD)
    rows: list[list[str]] = []
    for name, (platform, mesh) in sides.items():
        took = _in_subprocess(platform, mesh, config == SMALL)
        ratio = took["plan"] / took["xla"]
        cells = [f"{took[key]:.2f}" for key in ("plan", "xla", "ours")]
        rows.append([name, *cells, f"{ratio:.2f}", "<= 0.33", _met(ratio <= 1 / 3)])
    if len(sides) == 1:
        rows.append(["TPU", "", "", "", "", "", "libtpu is not installed"])
    title = f"Planning {_layers(config)}, scanned, and what XLA's compiler takes, in seconds"
    columns = ("back end", "plan", "XLA", "XLA, our program", "plan / XLA", "target", "")
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
        return tuple(evaluate(program, flat, "devices"))

    given = [value.name.startswith("batch") for value in program.ins]
    shardings = tuple(
        NamedSharding(devices, spec) if fixed else None
        for spec, fixed in zip(made.flat_specs[0], given, strict=True)
    )
    donated = tuple(i for i, donated in enumerate(made.traced.donated) if donated)
    shapes = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in program.ins]
    return jax.jit(model, in_shardings=shardings, donate_argnums=donated).lower(*shapes)


def compile_times(platform: str, mesh: Mapping[str, int], small: bool) -> dict[str, float]:
    """Seconds for the plan (the second, as a warm one), XLA's compilation, and of our program."""
    step = step_of(SMALL if small else CONFIG)
    plan(step, mesh)
    seconds, made = timed(step, mesh)
    devices = _devices(platform, mesh)
    lowered = lower_for_xla(made, devices)
    began = time.perf_counter()
    lowered.compile()
    xla = time.perf_counter() - began
    began = time.perf_counter()
    made.compile(devices)
    return {"plan": seconds, "xla": xla, "ours": time.perf_counter() - began}


def _devices(platform: str, mesh: Mapping[str, int]) -> Mesh:
    if platform == "cpu":
        devices: Sequence[Any] = jax.devices("cpu")
    else:
        from jax.experimental import topologies

        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=TPU_TOPOLOGY
        ).devices
    kinds = (AxisType.Auto,) * len(mesh)
    return jax.make_mesh(tuple(mesh.values()), tuple(mesh), kinds, devices=devices)


def _in_subprocess(platform: str, mesh: Mapping[str, int], small: bool) -> dict[str, float]:
    """`compile_times` in a process of its own, which has the devices."""
    count = 1
    for size in mesh.values():
        count *= size
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


# ------------------------------------------------------------------------------------------- output


def show(table: Table) -> None:
    """Prints `table`: with rich where it is installed, in plain columns where it is not."""
    try:
        from rich.console import Console
        from rich.table import Table as RichTable
    except ModuleNotFoundError:
        widths = [max(map(len, column)) for column in zip(table.columns, *table.rows, strict=True)]
        print(f"\n{table.title}")
        for row in (table.columns, *table.rows):
            print("  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip())
        return
    drawn = RichTable(title=table.title, title_justify="left", box=None, pad_edge=False)
    for i, column in enumerate(table.columns):
        drawn.add_column(column, justify="left" if i in (0, len(table.columns) - 1) else "right")
    for row in table.rows:
        drawn.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print("", drawn)


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
