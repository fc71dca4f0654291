"""The four models of GSPMD's announcement, compiled for the TPUs that they ran on.

Each is planned at its full size, and the TPU compiler, which needs no TPU, compiles its program
ahead of time: memory and bytes sent of one device, as planned and as compiled, and which of the
planned collectives the compiler kept, removed and added. One that is combined with others, or
turned into another kind, counts as removed, and its successor as added. What is live at once is to
be compared with what is planned to be: see `memory.py` for what a TPU's temporaries are else.

It takes 10 minutes of one core and 5 GB of memory.

    python benchmarks/headline.py [part of a name ...]
"""

import importlib.util
import os
import sys
import time
from collections.abc import Sequence

import jax
from published import Run, headline

import gspmd
from gspmd.models import catalog

ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
# As for a program whose collectives are to be counted: each one apart.
OPTIONS = {"xla_tpu_enable_async_collective_fusion": False}


def describe(run: Run) -> str:
    """What was planned of a run, and what the compiler made of it, or says against it."""
    step = catalog.step(
        run.model, run.config, tuple(run.mesh), batch_size=run.batch, strategy=run.strategy,
        optimizer=run.optimizer,
    )  # fmt: skip
    plan = gspmd.plan(step.fn, *step.args, mesh=run.mesh, **step.options)
    report = plan.report(run.topology.partition(":")[0], run.topology)
    mesh = ", ".join(f"{name}={size}" for name, size in run.mesh.items())
    lines = [
        f"{run.name} by {run.strategy} on {mesh}, {run.topology}",
        f"planned:  {plan.wire_bytes / 1e9:.3f} GB sent by each device, "
        f"{report.peak_bytes / 1e9:.3f} GB live at once",
    ]
    began = time.perf_counter()
    try:
        compiled = plan.compile(run.topology, OPTIONS)
    except jax.errors.JaxRuntimeError as error:
        return "\n".join([*lines, f"not compiled: {error}"])
    took, memory = time.perf_counter() - began, compiled.memory_analysis()
    live = "" if memory is None else f"; {memory.peak_memory_in_bytes / 1e9:.3f} GB live at once"
    return "\n".join([*lines, str(plan.compare(compiled)), f"compiled in {took:.0f} s{live}"])


def main(wanted: Sequence[str]) -> None:
    if not importlib.util.find_spec("libtpu"):
        raise SystemExit("The TPU compiler is missing: pip install libtpu, or gspmd[tpu].")
    os.environ |= ENVIRONMENT
    jax.config.update("jax_platforms", "cpu")
    for run in headline():
        if not wanted or any(word in run.name for word in wanted):
            print(f"{describe(run)}\n", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
