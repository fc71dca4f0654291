"""`gspmd train` and `gspmd demo`: a training job, told while it happens."""

import contextlib
import inspect
import os
import shlex
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text
from typer import Exit

from gspmd.cli.chart import check_drawable, curve, save_curve
from gspmd.cli.job import Job, JobError, make_job
from gspmd.cli.show import plan_json, summary
from gspmd.cli.terminal import (
    LIMIT_BROKEN,
    complain,
    console,
    own_stdout,
    printable,
    say,
    say_json,
    silent,
)
from gspmd.models import blocks, layers, transformer
from gspmd.models.tasks import PROMPT
from gspmd.models.training import (
    Record,
    State,
    check_checkpoints,
    targets_per_second,
    to_host,
)

# Sums of float32 in another order differ in their last bit. Training amplifies that: two runs of
# plain jax.jit whose parameters start one last bit apart are 1e-4 apart after some 100 steps.
COMPARED, SAME_LOSS = 60, 1e-4  # steps, relative


def train(job: Job, *, resume: bool, plot: Path | None, sample: int | None, as_json: bool) -> None:
    """Trains, prints what happened, how good the model is, and `sample` of what it can do.

    Of several processes, which all do and would say the same, the first one speaks.
    """
    with _one_voice(job):
        _train(job, resume, plot, sample, as_json)


@contextlib.contextmanager
def _one_voice(job: Job) -> Generator[None]:
    with contextlib.ExitStack() as stack:
        if jax.distributed.is_initialized():
            on_cpu = job.devices.devices.flat[0].platform == "cpu"
            stack.enter_context(own_stdout(others=os.devnull if on_cpu else "/dev/stderr"))
        if jax.process_index() > 0:
            stack.enter_context(silent())
        yield


def _train(job: Job, resume: bool, plot: Path | None, sample: int | None, as_json: bool) -> None:
    if resume and job.schedule.checkpoints is None:
        raise JobError("--resume needs --checkpoint DIR, the folder to go on from.")
    check_checkpoints(job.schedule, resume)
    if plot is not None:
        check_drawable(plot)
    if not as_json:
        say(summary(job.plan))
        say("")
    records, state = _run(job, resume)
    if plot is not None and records and jax.process_index() == 0:
        save_curve(plot, _points(records), job.task.unit)
    params = to_host(state["params"])
    scores = job.task.judge(params)
    count = job.task.shown if sample is None else sample
    text = job.task.show(params, count) if count else ""
    if as_json:
        found = {**_json(records), "held_out": dict(scores), "sample": text}
        say_json({"plan": plan_json(job.plan), **found})
        return
    say(_outcome(records, job.task.unit))
    say(Text(f"held out: {', '.join(f'{name} {score:.3f}' for name, score in scores.items())}"))
    if text:
        say(Text(f"\n{printable(text)}"))


def demo(steps: int) -> None:
    """Shows the main job: annotations, the plan they lead to, training, the same losses."""
    jax.config.update("jax_platforms", "cpu")  # the same show on every machine
    job = make_job("transformer", config="tiny", mesh="data=2,model=4", strategy="2d", steps=steps)
    _title("A Transformer, written for one device. These lines say what may be split:")
    for module in (transformer, layers, blocks):
        say(_annotations(Path(inspect.getfile(module))))
    _title("One training step, planned for a mesh of 2 x 4:")
    say(summary(job.plan))
    _title(f"{steps} steps on the source code of Python's standard library, on 8 CPU devices:")
    records, state = _run(job)
    say(_outcome(records, job.task.unit))
    alone: list[Record] = []
    job.train_alone(alone.append, steps=min(steps, COMPARED))
    pairs = zip(alone, records, strict=False)
    worst = max(abs(a.loss - r.loss) / abs(a.loss) for a, r in pairs)
    _title(f"The first {len(alone)} steps again, on one device with jax.jit, unpartitioned:")
    say(f"losses differ by {worst:.1e} at most, relatively")
    _title(f"What it writes after {PROMPT!r}, {steps} steps old:")
    say(Text(printable(job.task.show(to_host(state["params"]), 160))))
    if not worst <= SAME_LOSS:
        complain(f"losses may differ by {SAME_LOSS:.0e} at most, and differ by {worst:.1e}.")
        raise Exit(LIMIT_BROKEN)


def _run(job: Job, resume: bool = False) -> tuple[list[Record], State]:
    """What each step did, and the last state; progress goes to stderr."""
    records: list[Record] = []
    with _watching(console(sys.stderr), job) as show:

        def on_step(record: Record) -> None:
            records.append(record)
            show(records)

        try:
            return records, job.train(on_step, resume)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_how_to_resume(job, records)) from None


def _how_to_resume(job: Job, records: Sequence[Record]) -> str:
    if not records:
        return "stopped before a step was done."
    stopped = f"stopped after step {records[-1].step}"
    if job.schedule.checkpoints is None:
        return f"{stopped}; nothing is kept, as it would have been with --checkpoint DIR."
    if jax.distributed.is_initialized():
        return f"{stopped}; start all processes again, with --resume, to go on."
    again = [arg for arg in sys.argv[1:] if arg != "--resume"]
    return f"{stopped}; go on with: {shlex.join(['gspmd', *again, '--resume'])}"


@contextlib.contextmanager
def _watching(out: Console, job: Job) -> Generator[Callable[[Sequence[Record]], None]]:
    """What to call with the records so far: a bar on a terminal, else a line now and then."""
    steps, unit = job.schedule.steps, job.task.unit
    if not out.is_terminal:
        yield lambda records: _report(out, records, steps, unit)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[told]}"),
    )  # fmt: skip
    with Progress(*columns, console=out, transient=True) as bar:
        task = bar.add_task("compiling", total=steps, told="")

        def show(records: Sequence[Record]) -> None:
            done = records[-1].step
            bar.update(task, completed=done, description="training", told=_told(records, unit))

        yield show


def _report(out: Console, records: Sequence[Record], steps: int, unit: str) -> None:
    step = records[-1].step
    if len(records) == 1 or step == steps or step % max(steps // 10, 1) == 0:
        out.print(f"step {step}/{steps}  {_told(records, unit)}")


def _told(records: Sequence[Record], unit: str) -> str:
    last = records[-1]
    if len(records) == 1:  # its time is that of compilation
        return f"loss {last.loss:.3f}"
    return f"loss {last.loss:.3f}  {last.targets / last.seconds:,.0f} {unit}s/s"


def _outcome(records: Sequence[Record], unit: str) -> RenderableType:
    """The loss curve, and a line that sums it up."""
    if not records:
        return Text("no step was left to do")
    first, last = records[0], records[-1]
    told = (
        f"loss {first.loss:.3f} at step {first.step}, {last.loss:.3f} at step {last.step}; "
        f"{targets_per_second(records):,.0f} {unit}s per second"
    )
    plain = console(sys.stdout).options.ascii_only
    return Group(Text(curve(_points(records), plain=plain)), Text(), Text(told))


def _json(records: Sequence[Record]) -> dict[str, Any]:
    return {
        "first_step": records[0].step if records else None,
        "losses": [record.loss for record in records],
        "targets_per_second": targets_per_second(records) if records else None,
    }


def _points(records: Sequence[Record]) -> list[tuple[int, float]]:
    return [(record.step, record.loss) for record in records]


def _annotations(path: Path) -> Text:
    """The lines of a file that call `annotate`, with its name and their numbers."""
    lines = enumerate(path.read_text().splitlines(), 1)
    shown = [(f"{path.name}:{i}", line.strip()) for i, line in lines if "annotate(" in line]
    return Text("\n".join(f"{where:<19}  {line}" for where, line in shown))


def _title(text: str) -> None:
    say(Text(f"\n{text}\n", "bold"))
