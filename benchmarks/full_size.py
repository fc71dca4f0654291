"""Every published configuration at its full size: what a training step needs, without a chip.

One row a configuration: its parameters, the devices it was published with (or some that it fits,
where those are not published: see "chosen"), the mesh and the strategy, CPU time of planning,
how many findings it has, and what one device holds and sends in a step. Utilization is predicted,
beside the published one where there is one; see `utilization_table.py` for how it is counted.
The whole takes 5 minutes of one core. `headline.py` compiles four of them.

    python benchmarks/full_size.py [part of a name ...]
"""

import math
import sys
import time
from collections.abc import Sequence

import jax
from published import Run, runs, sizes
from utilization_table import utilization

import gspmd
from gspmd.models import catalog

COLUMNS = (
    ("configuration", 27), ("parameters", 19), ("devices", 9), ("  mesh", 27), ("strategy", 13),
    ("planned", 9), ("findings", 10), ("memory", 13), ("sent", 10), ("util. %", 9), ("publ.", 7),
    ("  chosen", 16),
)  # fmt: skip
WORDS = ("configuration", "  mesh", "strategy", "  chosen")


def line(cells: Sequence[str]) -> str:
    pairs = zip(cells, COLUMNS, strict=True)
    return "".join(
        cell.ljust(width) if name in WORDS else cell.rjust(width) for cell, (name, width) in pairs
    ).rstrip()


def row(run: Run) -> tuple[list[str], list[str]]:
    """The cells of a run, and what its plan finds."""
    step = catalog.step(
        run.model, run.config, tuple(run.mesh), batch_size=run.batch, strategy=run.strategy,
        optimizer=run.optimizer,
    )  # fmt: skip
    began = time.process_time()
    plan = gspmd.plan(step.fn, *step.args, mesh=run.mesh, **step.options)
    took = time.process_time() - began
    report = plan.report(run.topology.partition(":")[0], run.topology)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(step.args[0]["params"]))
    full = "" if report.fits else " (!)"
    cells = [
        run.name,
        f"{count:,}",
        f"{report.devices:,}",
        "  " + ",".join(f"{name}={size}" for name, size in run.mesh.items()),
        run.strategy,
        f"{took:.1f} s",
        f"{len(plan.findings)}",
        f"{report.peak_bytes / 1e9:.1f} GB{full}",
        f"{plan.wire_bytes / 1e9:.1f} GB",
        f"{100 * utilization(run, report):.1f}",
        "" if math.isnan(run.utilization) else f"{100 * run.utilization:.1f}",
        f"  {run.chosen}",
    ]
    return cells, [f"{run.name}: {finding}" for finding in plan.findings]


def main(wanted: Sequence[str]) -> None:
    jax.config.update("jax_platforms", "cpu")
    print(line([name for name, _ in COLUMNS]))
    found: list[str] = []
    for run in (*runs(), *sizes()):
        if wanted and not any(word in run.name for word in wanted):
            continue
        cells, findings = row(run)
        found += findings
        print(line(cells), flush=True)
    print("\n(!) more than a device has\n")
    print("\n".join(found) or "no findings")


if __name__ == "__main__":
    main(sys.argv[1:])
