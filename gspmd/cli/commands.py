"""The command line: `gspmd plan`, `explain`, `report`, `sweep`, `train`, `launch`, `demo`.

Exit codes: 0 fine, 1 the plan breaks a limit that was asked for, 2 bad usage or input, 130 stopped
by Ctrl-C. An error is one sentence on stderr; `--debug` shows its traceback as well.
"""

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.text import Text
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"gspmd: the command line needs {missing.name}; run: pip install 'gspmd[cli]'"
    ) from missing

from gspmd.cli.chart import check_drawable
from gspmd.cli.load import chip_and_topology, make_plan, read_bytes, read_rules, read_subject
from gspmd.cli.show import executions, plan_json, show_bytes, summary
from gspmd.cli.terminal import LIMIT_BROKEN, complain, plain_errors, say, say_json
from gspmd.distributed import join, leaving_at_once
from gspmd.plan import Plan

app = typer.Typer(
    help="A partitioner you can read: plan, explain and run annotated JAX programs on a mesh.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Target = Annotated[str, typer.Argument(metavar="FILE.py:FUNCTION", help="What to plan.")]
MeshOption = Annotated[
    str | None, typer.Option("--mesh", metavar="AXES", help="Such as data=256,model=8.")
]
RulesOption = Annotated[
    list[str] | None,
    typer.Option("--rules", metavar="TABLE", help="Logical names: batch=data,mlp=model+data."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def main() -> None:
    """Runs the command line; does not return."""
    with leaving_at_once():
        app(prog_name="gspmd")


@app.command("plan")
def plan_command(
    target: Target,
    mesh: MeshOption = None,
    rules: RulesOption = None,
    max_wire_bytes: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Exit 1 if a device sends more in a call: 10GB."),
    ] = None,
    max_collectives: Annotated[
        int | None, typer.Option(min=0, help="Exit 1 if a call executes more of them.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 1 if an op can only run gathered.")
    ] = False,
    program: Annotated[
        bool, typer.Option("--program", help="Print the program that each device runs.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Plan a function: what every device sends, and who caused it.

    FUNCTION takes no arguments and returns (fn, args) or (fn, args, options of gspmd.plan), or it
    is decorated with gspmd.partition. Arguments may be jax.ShapeDtypeStructs: it needs no device.
    """
    with plain_errors(debug):
        limit = None if max_wire_bytes is None else read_bytes(max_wire_bytes)
        made = _plan(target, mesh, rules, strict)
        broken = list(_broken(made, limit, max_collectives))
        if as_json:
            text = {"program": str(made)} if program else {}
            say_json({**plan_json(made), **text, "broken_limits": broken})
        else:
            say(summary(made))
            if program:
                say(Text(f"\n{made}"))
        for sentence in broken:
            complain(sentence)
        if broken:
            raise typer.Exit(LIMIT_BROKEN)


@app.command()
def explain(
    target: Target,
    what: Annotated[
        str, typer.Argument(metavar="N", help="A collective's number, a file:line, or params/wi.")
    ],
    mesh: MeshOption = None,
    rules: RulesOption = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Explain a collective, a line or an argument: who split it.

    The answer is the chain of shardings that met there, each down to the line that set it.
    """
    with plain_errors(debug):
        made = _plan(target, mesh, rules, strict=False)
        why = str(made.why(int(what) if what.isdecimal() else what))
        if as_json:
            say_json({"about": what, "why": why})
        else:
            say(Text(why))


Chip = Annotated[
    str | None, typer.Option(metavar="NAME", help="Such as h100; else that of the topology.")
]
Strategy = Annotated[
    str | None, typer.Option(help="For a model: what splits what: data, fsdp, tensor, 2d, ...")
]
Optimizer = Annotated[
    str | None, typer.Option(help="For a model: adafactor, if not said, adamw or sgd.")
]
Microbatches = Annotated[
    int | None,
    typer.Option(min=1, help="For a mesh axis 'stage', a pipeline: the parts of a batch."),
]
Trips = Annotated[int | None, typer.Option(min=1, help="How often a loop without a bound runs.")]
ModelTarget = Annotated[
    str,
    typer.Argument(metavar="TARGET", help="FILE.py:FUNCTION, or models.glam:64B_64E."),
]


@app.command("report")
def report_command(
    target: ModelTarget,
    mesh: MeshOption = None,
    topology: Annotated[
        str | None, typer.Option(metavar="NAME", help="Such as tpu-v3:16x32 or h100:8x32.")
    ] = None,
    chip: Chip = None,
    rules: RulesOption = None,
    strategy: Strategy = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="For a model: examples in a step; 1 a device.")
    ] = None,
    optimizer: Optimizer = None,
    microbatches: Microbatches = None,
    trips: Trips = None,
    why: Annotated[
        str | None, typer.Option(metavar="NUMBER", help="What a number is made of: flops.model.")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile it, too: what did the TPU compiler keep?")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Report what a step costs on hardware: time, memory, utilization.

    Nothing runs, and no chip is needed. TARGET is as for plan, or a training step of a reference
    model in one of its published sizes.
    """
    with plain_errors(debug):
        from gspmd.cli import show_report  # with all that is known of hardware

        hardware = chip_and_topology(chip, topology)
        with contextlib.redirect_stdout(sys.stderr):
            subject = read_subject(target, mesh, strategy, batch, optimizer, microbatches)
            made = make_plan(subject, mesh, read_rules(rules or ()))
            found = made.report(*hardware, trips=trips)
            judged = made.compare(made.compile(topology)) if compiled else None
        if why is not None:
            say(Text(found.why(why)))
        elif as_json:
            say_json(show_report.report_json(found, judged))
        else:
            say(show_report.summary(found))
            if judged is not None:
                say(Text(f"\n{judged}"))


@app.command()
def sweep(
    target: ModelTarget,
    topology: Annotated[
        list[str], typer.Option(metavar="NAME", help="Such as tpu-v3:16x32; several to compare.")
    ],
    mesh_shapes: Annotated[
        str, typer.Option(metavar="SHAPES", help="all, or such as 16x64,32x32.")
    ] = "all",
    axes: Annotated[str, typer.Option(metavar="NAMES", help="The mesh's axes.")] = "data,model",
    rules: RulesOption = None,
    strategy: Strategy = None,
    batch: Annotated[
        float | None,
        typer.Option(min=0.0, help="For a model: examples in a step for each device; 1."),
    ] = None,
    optimizer: Optimizer = None,
    microbatches: Microbatches = None,
    trips: Trips = None,
    effort: Annotated[int, typer.Option(min=0, max=2, help="As in gspmd.plan.")] = 1,
    processes: Annotated[int, typer.Option(min=1, help="Plans that are made at once.")] = 2,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw time and utilization here.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare mesh shapes: memory, bytes sent, step time, utilization.

    Every shape of the mesh is planned and reported; a line says why where one cannot be.
    """
    with plain_errors(debug):
        from gspmd.cli import estimate, scaling, show_report

        if plot is not None:
            check_drawable(plot)
        request = estimate.Request(
            target, read_rules(rules or ()), strategy, batch, optimizer, effort, microbatches, trips
        )
        names = [name.strip() for name in axes.split(",")]
        count, found = estimate.sweep(request, topology, names, mesh_shapes, processes)
        rows = list(show_report.progress(found, count, quiet=as_json))
        if as_json:
            say_json({"rows": [show_report.row_json(row) for row in rows]})
        else:
            say(show_report.table(rows))
        estimate.check_found(rows)
        if plot is not None:
            scaling.save(plot, rows, target)


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="transformer, glam, vmoe, nest or nest_gan.")],
    mesh: Annotated[
        str | None, typer.Option("--mesh", metavar="AXES", help="Such as data=2,model=4.")
    ] = None,
    config: Annotated[str | None, typer.Option(help="The model's size: tiny, digits, ...")] = None,
    strategy: Annotated[
        str | None, typer.Option(help="What splits what: data, fsdp, tensor, 2d, expert, ...")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences, or images, in a step.")
    ] = None,
    seq: Annotated[int | None, typer.Option(min=1, help="For text: bytes in a sequence.")] = None,
    dropout: Annotated[
        float | None, typer.Option(min=0.0, max=0.99, help="For text: share of what is dropped.")
    ] = None,
    microbatches: Microbatches = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Save the state here, now and then.")
    ] = None,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 50,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the latest checkpoint in DIR.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the loss curve here as well.")
    ] = None,
    sample: Annotated[
        int | None, typer.Option(min=0, help="Bytes to write, or images to show, at the end.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a reference model, partitioned over a mesh.

    Text is the source files of Python's standard library, images are the handwritten digits of
    scikit-learn. What is not given follows from the model. Where this machine has too few
    accelerators for the mesh, CPU devices stand in for them. Several processes, started by gspmd
    launch, train together.
    """
    with plain_errors(debug):
        from gspmd.cli import job, trainer  # with flax and optax, which planning does without

        join()
        made = job.make_job(
            model,
            config=config,
            microbatches=microbatches,
            mesh=mesh,
            strategy=strategy,
            batch_size=batch,
            sizes={k: v for k, v in (("seq", seq), ("dropout", dropout)) if v is not None},
            steps=steps,
            seed=seed,
            checkpoints=checkpoint,
            save_every=save_every,
        )
        trainer.train(made, resume=resume, plot=plot, sample=sample, as_json=as_json)


@app.command("launch", context_settings={"allow_interspersed_args": False})
def launch_command(
    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND...", help="Such as: gspmd train ...")
    ],
    processes: Annotated[int, typer.Option(metavar="N", help="Processes to start.")],
    devices: Annotated[
        int, typer.Option("--devices-per-process", metavar="N", help="Devices that each brings.")
    ],
    port: Annotated[
        int | None, typer.Option(metavar="PORT", help="Where the first one listens; any, if free.")
    ] = None,
    logs: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep what the others print here.")
    ] = None,
    where: Annotated[
        str | None,
        typer.Option("--for", metavar="NAME", help="Print how to start it: slurm, gke, mpirun."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Start a program as several processes, on this machine or elsewhere.

    They find each other by gspmd.distributed. Where there are too few GPUs, CPU devices stand in.
    The first process prints here. If one fails, the run ends with its exit code and the end of its
    log.
    """
    with plain_errors(debug), contextlib.ExitStack() as closing:
        from gspmd.cli import clusters, launch

        made = launch.Launch(tuple(command), processes, devices)
        if where is not None:
            say(Text(clusters.how_to_start(made, where)))
            return
        if port is not None:
            launch.check_port(port)
        if logs is not None:
            launch.make_folder(logs)
        folder = logs or Path(closing.enter_context(tempfile.TemporaryDirectory()))
        raise typer.Exit(launch.run(made, port or launch.free_port(), folder, tell=complain))


@app.command()
def demo(
    steps: Annotated[int, typer.Option(min=2)] = 150,
    debug: Debug = False,
) -> None:
    """Train a tiny Transformer on 8 CPU devices, explained."""
    with plain_errors(debug):
        from gspmd.cli import trainer

        trainer.demo(steps)


def _plan(target: str, mesh: str | None, rules: list[str] | None, strict: bool) -> Plan:
    # What the user's file prints is not our result.
    with contextlib.redirect_stdout(sys.stderr):
        return make_plan(read_subject(target), mesh, read_rules(rules or ()), strict)


def _broken(plan: Plan, wire_bytes: float | None, collectives: int | None) -> Iterator[str]:
    if wire_bytes is not None and plan.wire_bytes > wire_bytes:
        yield (
            f"each device sends {show_bytes(plan.wire_bytes)}, more than the "
            f"{show_bytes(wire_bytes)} of --max-wire-bytes."
        )
    if collectives is not None and executions(plan) > collectives:
        yield (
            f"a call executes {executions(plan)} collectives, more than the {collectives} of "
            "--max-collectives."
        )
