"""Predicted beside published: utilization and step time of the models of the literature.

Each run is planned at its full size for all of its devices, and `plan.report` says what a step
takes on its chips. Nothing is fitted to a run: the numbers about hardware are those of
`gspmd.meshes`. Published step times that are not printed follow from the utilization.

    python benchmarks/utilization_table.py [part of a name ...]
"""

import sys
import time
from collections.abc import Sequence

import jax
from published import Run, runs

import gspmd
from gspmd.models import catalog
from gspmd.report import Report


def predict(run: Run) -> Report:
    """The report of a run's training step."""
    step = catalog.step(
        run.model, run.config, tuple(run.mesh), batch_size=run.batch, strategy=run.strategy,
        optimizer=run.optimizer,
    )  # fmt: skip
    plan = gspmd.plan(step.fn, *step.args, mesh=run.mesh, **step.options)
    return plan.report(run.topology.partition(":")[0], run.topology)


def utilization(run: Run, report: Report) -> float:
    """The predicted utilization, counted as the published one."""
    return {"model": report.mfu, "hardware": report.hfu, "counted": report.utilization}[run.counts]


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """How far two rankings agree: 1 the same order, -1 the reverse."""
    ranks = [[sorted(xs).index(x) for x in xs] for xs in (first, second)]
    n = len(first)
    return 1 - 6 * sum((a - b) ** 2 for a, b in zip(*ranks, strict=True)) / (n * (n * n - 1))


def main(wanted: Sequence[str]) -> None:
    jax.config.update("jax_platforms", "cpu")
    chosen = [run for run in runs() if not wanted or any(word in run.name for word in wanted)]
    print(f"{'run':<26}{'devices':>8}  {'utilization %':^24}{'step s':^18}{'exposed':>8}"
          f"{'memory':>9}{'planned':>9}")  # fmt: skip
    print(f"{'':<36}{'published':>10}{'predicted':>10}{'off':>6}{'publ.':>8}{'pred.':>8}")
    found: list[tuple[Run, float]] = []
    for run in chosen:
        started = time.perf_counter()
        report = predict(run)
        share = utilization(run, report)
        found.append((run, share))
        step = report.seconds.step
        published = run.seconds if run.seconds == run.seconds else step * share / run.utilization
        print(
            f"{run.name:<26}{report.devices:>8}  {100 * run.utilization:>8.1f}{100 * share:>10.1f}"
            f"{100 * (share / run.utilization - 1):>+7.1f}%{published:>8.2f}{step:>8.2f}"
            f"{100 * report.seconds.exposed / step:>7.0f}%{report.peak_bytes / 1e9:>7.1f}GB"
            f"{time.perf_counter() - started:>8.1f}s",
            flush=True,
        )
    errors = [abs(share / run.utilization - 1) for run, share in found]
    print(f"\nmean error {100 * sum(errors) / len(errors):.1f} %, worst {100 * max(errors):.1f} %")
    for group in dict.fromkeys(run.group for run, _ in found if run.group):
        rows = [(run.utilization, share) for run, share in found if run.group == group]
        if len(rows) > 2:
            print(f"order of {group}: Spearman {spearman(*zip(*rows, strict=True)):.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
