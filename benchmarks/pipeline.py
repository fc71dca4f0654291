"""Pipelines: beside XLA's partitioner, beside the same model without one, and how long they plan.

    python benchmarks/pipeline.py [--quick] [--only xla|bubble|plan]

The first table is that of `against_xla.py`: the same program with the same annotations by this
library and by `jax.jit`, where the one on the dim of stages is a `with_sharding_constraint` too.
Its flops are the compiler's count, a loop's body once: of ours, short loops in loops are unrolled.

The second has the time of a training step in a pipeline over that of the same model split by data
alone, on as many devices. A pipeline also computes in its bubble: it should take the other's time
divided by the share of ticks that are no bubble, and at most a tenth more. CPU devices share the
cores of the machine, so that what the bubble computes takes time there as well. In each tick a
device reads all of its weights and adds to all of their gradients, for the tokens of one
microbatch: where these are few, that takes longer than the products. Hence two batches.

The third shows that planning does not depend on the numbers of stages and microbatches.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from against_xla import DEVICES, ENVIRONMENT, EQUAL_TIME, EVERYWHERE, ROUNDING, table
from cases import Case
from devices import devices_mesh
from jax.sharding import PartitionSpec as P
from sides import OURS, Row, Side, arguments, measure
from table import Table, show
from worker import measure_all, work

import gspmd
from gspmd.annotate import annotate
from gspmd.bubble import Ticks

MODEL, HIDDEN, LAYERS = 256, 1024, 8
QUICK = 32  # times narrower
RULES = {"stage": "stage", "batch": "data", "rows": "data", "hidden": "model"}
WITHIN = 1.1
ROWS = 1024  # tokens of a batch
BATCHES = {ROWS: 30, 4 * ROWS: 10}  # tokens of a batch, and how many of its steps are timed


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a model of eight layers is run: on which mesh, in how many stages and microbatches."""

    name: str
    mesh: Mapping[str, int]
    stages: int
    micro: int
    repeats: int = 1
    remat: bool = False
    rows: int = ROWS

    @property
    def ticks(self) -> Ticks:
        return Ticks(self.stages, self.micro, self.repeats)

    @property
    def rules(self) -> Mapping[str, str | None]:
        return {name: axis if axis in self.mesh else None for name, axis in RULES.items()}


LAYOUTS = (
    Layout("gpipe", {"stage": 8}, 8, 16),
    Layout("gpipe, remat", {"stage": 8}, 8, 16, remat=True),
    Layout("circular", {"stage": 4, "data": 2}, 4, 8, repeats=2),
    Layout("4 stages x 2 data", {"stage": 4, "data": 2}, 4, 16),
    Layout("2 stages x 2 data x 2 model", {"stage": 2, "data": 2, "model": 2}, 2, 8),
    Layout("2 stages x 4 model", {"stage": 2, "model": 4}, 2, 8),
)


def layer(w: Any, x: jax.Array) -> jax.Array:
    h = annotate(jax.nn.gelu(annotate(x, P("batch", None)) @ w["up"]), P("batch", "hidden"))
    return annotate(x + h @ w["down"], P("batch", None))


def loss(layout: Layout, w: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Of the pipeline; `w` are the stages."""
    made = gspmd.pipeline(
        gspmd.run_layers(layer), (w, None), gspmd.to_microbatches(x, layout.micro),
        stages=layout.stages, schedule="circular" if layout.repeats > 1 else "gpipe",
        repeats=layout.repeats, remat=layout.remat,
    )  # fmt: skip
    return jnp.mean(jnp.square(gspmd.from_microbatches(made, x.shape[0]) - y))


def plain_loss(w: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Of the same model without one; `w` are the layers."""
    return jnp.mean(jnp.square(jax.lax.scan(lambda x, w: (layer(w, x), None), x, w)[0] - y))


def weights(leading: tuple[int, ...], width: int) -> dict[str, jax.ShapeDtypeStruct]:
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    M, H = MODEL // width, HIDDEN // width
    return {"up": shape((*leading, M, H)), "down": shape((*leading, H, M))}


def case(layout: Layout, train: bool, width: int) -> Case:
    """A step of `layout`: its loss, and with `train` its gradients."""
    own = (layout.stages,) + (layout.repeats,) * (layout.repeats > 1)
    w = weights((*own, LAYERS // (layout.stages * layout.repeats)), width)
    x = jax.ShapeDtypeStruct((layout.rows, MODEL // width), jnp.float32)
    whole = (None,) * len(own)
    specs = {"up": P("stage", *whole, None, "hidden"), "down": P("stage", *whole, "hidden", None)}
    fn = functools.partial(loss, layout)
    fn, outs = (jax.value_and_grad(fn), (P(), specs)) if train else (fn, P())
    name = f"{layout.name}, {'train' if train else 'forward'}"
    return Case(name, fn, (w, x, x), layout.mesh, layout.rules, (specs, P("rows"), P("rows")), outs)


def cases(width: int) -> Iterator[Case]:
    for layout in LAYOUTS:
        yield case(layout, False, width)
        yield case(layout, True, width)


# ------------------------------------------------------------------------------------ beside XLA


def against_xla(quick: bool) -> tuple[Table, list[str]]:
    """The table of `against_xla.py` for pipelines, and whether bytes and times are met."""
    listed = list(cases(QUICK if quick else 1))
    command = [sys.executable, __file__, "--work", "xla"] + ["--quick"] * quick
    measured: list[tuple[Case, Row]] = []
    for i, one in enumerate(listed[2:4] if quick else listed, 2 * quick):
        (found,) = measure_all(command, EVERYWHERE | ENVIRONMENT["cpu"], [i]).values()
        row = Row(**found.found)
        row.sides = {name: Side(**side) for name, side in found.found["sides"].items()}
        row.notes += [f"{part}: {how}" for part, how in found.died.items()]
        measured.append((one, row))
        print(f"{one.name}: bytes {row.ratio('bytes')}, seconds {row.ratio('seconds')}",
              file=sys.stderr, flush=True)  # fmt: skip
    lines = [
        _met(f"{what} at most {limit:.2f} of XLA's in all cases", ratios(measured, what), limit)
        for what, limit in (("bytes", ROUNDING), ("seconds", EQUAL_TIME))
    ]
    failed = [one.name for one, row in measured if OURS not in row.sides or row.wrong]
    return table("cpu", measured), [*lines, f"{'MISSED' if failed else 'met'}: wrong: {failed}"]


def ratios(measured: list[tuple[Case, Row]], what: str) -> dict[str, float]:
    found = {one.name: row.ratio(what) for one, row in measured}
    return {name: ratio for name, ratio in found.items() if ratio is not None}


def _met(what: str, found: Mapping[str, float], limit: float) -> str:
    above = {name: round(ratio, 3) for name, ratio in found.items() if ratio > limit}
    return f"MISSED: {what}, but {above}" if above else f"met: {what}"


# --------------------------------------------------------------------------- beside no pipeline


def bubble(quick: bool) -> tuple[Table, list[str]]:
    """The seconds of a training step of each layout, over those of one that splits data alone."""
    took = _in_subprocess("bubble", quick)
    rows: list[list[str]] = []
    lines: list[str] = []
    for batch in BATCHES:
        judged: dict[str, float] = {}
        for layout in LAYOUTS:
            ticks, (ours, plain) = layout.ticks, took[str(batch)][layout.name]
            corrected = ours / plain * (1 - ticks.bubble)
            if not layout.remat:
                judged[layout.name] = corrected
            each = batch // layout.micro // layout.mesh.get("data", 1)
            cells = [f"{x}" for x in (batch, each, layout.stages, layout.micro, layout.repeats)]
            cells += [f"{ticks.bubble:.2f}", *(f"{1e3 * x:.1f}" for x in (ours, plain))]
            met = "" if layout.remat else "met" if corrected <= WITHIN else "MISSED"
            rows.append([layout.name, *cells, f"{ours / plain:.2f}", f"{corrected:.2f}", met])
        what = f"at most {WITHIN} of the time without, bubble corrected, of {batch} tokens"
        lines.append(_met(what, judged, WITHIN))
    columns = (
        "layout", "tokens", "a tick and device", "stages", "microbatches", "rounds", "bubble",
        "ms", "ms without", "x", "x, bubble corrected", "",
    )  # fmt: skip
    return Table(f"Training step on {DEVICES} CPU devices", columns, rows, width=150), lines


def step_times(quick: bool) -> dict[int, dict[str, tuple[float, float]]]:
    """By batch and layout, the median seconds of a step in the pipeline and of one without,
    interleaved."""
    width = QUICK if quick else 1
    return {
        batch: {
            layout.name: _in_turn(
                case(dataclasses.replace(layout, rows=batch), True, width),
                plain_case(batch, width),
                4 if quick else rounds,
            )
            for layout in LAYOUTS
        }
        for batch, rounds in BATCHES.items()
    }


def plain_case(batch: int, width: int) -> Case:
    """A training step without a pipeline, split by data alone."""
    shape = jax.ShapeDtypeStruct((batch, MODEL // width), jnp.float32)
    return Case(
        "plain", jax.value_and_grad(plain_loss), (weights((LAYERS,), width), shape, shape),
        {"data": DEVICES}, {"batch": "data", "hidden": None}, (P(), P("data"), P("data")),
    )  # fmt: skip


def _in_turn(ours: Case, plain: Case, rounds: int) -> tuple[float, float]:
    calls = [_call(one) for one in (ours, plain)]
    times: list[list[float]] = [[], []]
    for i in range(rounds):
        for one in ((0, 1), (1, 0))[i % 2]:
            began = time.perf_counter()
            jax.block_until_ready(calls[one]())
            times[one].append(time.perf_counter() - began)
    return statistics.median(times[0]), statistics.median(times[1])


def _call(one: Case) -> Callable[[], Any]:
    mesh = devices_mesh("cpu", one.mesh)
    plan = gspmd.plan(
        one.fn, *one.args, mesh=mesh, in_specs=one.in_specs, out_specs=one.out_specs,
        rules=one.rules,
    )  # fmt: skip
    args = arguments(one, mesh)
    jax.block_until_ready(plan.run(*args))
    return lambda: plan.run(*args)


def _in_subprocess(what: str, quick: bool) -> Any:
    """What a process of its own, which has the devices, prints."""
    command = [sys.executable, __file__, "--work", what] + ["--quick"] * quick
    environment = {**os.environ, **EVERYWHERE, **ENVIRONMENT["cpu"]}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------ planning


def planning(quick: bool) -> tuple[Table, list[str]]:
    """CPU seconds of a plan of the training step, and its ops, by stages and microbatches."""
    rows: list[list[str]] = []
    counts: set[int] = set()
    for stages, micro in ((2, 4), (4, 16), (8, 8), (8, 64), (8, 256)):
        layout = Layout("", {"stage": stages, "data": 8}, stages, micro, rows=8 * micro)
        one = case(layout, True, 1)
        best = []
        for _ in range(2 if quick else 5):
            began = time.process_time()
            plan = gspmd.plan(
                one.fn, *one.args, mesh=one.mesh, in_specs=one.in_specs, rules=one.rules
            )
            best.append(time.process_time() - began)
        ops = sum(1 for _ in plan.program.walk())
        counts.add(ops)
        rows.append(
            [f"{stages}", f"{micro}", f"{layout.ticks.count}", f"{min(best):.2f}", f"{ops}"]
        )
    columns = ("stages", "microbatches", "ticks", "CPU s", "ops of the local program")
    line = f"{'met' if len(counts) == 1 else 'MISSED'}: programs of {sorted(counts)} ops"
    return Table("Planning a training step", columns, rows), [line]


TABLES = {"xla": against_xla, "bubble": bubble, "plan": planning}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--only", choices=TABLES, help="one table")
    parser.add_argument("--work", choices=("xla", "bubble"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work == "xla":
        listed = list(cases(QUICK if given.quick else 1))
        work(lambda i, skip: dataclasses.asdict(measure(listed[i], "cpu", skip)))
        return
    if given.work == "bubble":
        print(json.dumps(step_times(given.quick)))
        return
    jax.config.update("jax_platforms", "cpu")
    for name, make in TABLES.items():
        if given.only in (None, name):
            made, lines = make(given.quick)
            show(made)
            print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
