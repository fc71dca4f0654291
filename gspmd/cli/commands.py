"""The command line: `gspmd plan`, `explain`, `train`, `demo`.

Exit codes: 0 fine, 1 the plan breaks a limit that was asked for, 2 bad usage or input, 130 stopped
by Ctrl-C. An error is one sentence on stderr; `--debug` shows its traceback as well.
"""

import contextlib
import sys
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

from gspmd.cli.load import make_plan, read_bytes, read_rules, read_subject
from gspmd.cli.show import executions, plan_json, show_bytes, summary
from gspmd.cli.terminal import LIMIT_BROKEN, complain, plain_errors, say, say_json
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


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="The model: transformer.")],
    mesh: Annotated[str, typer.Option("--mesh", metavar="AXES", help="Such as data=2,model=4.")],
    config: Annotated[str, typer.Option(help="The model's size: tiny, small, ...")] = "tiny",
    strategy: Annotated[str, typer.Option(help="What splits what: data, fsdp, tensor, 2d.")] = "2d",
    steps: Annotated[int, typer.Option(min=1)] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Sequences in a step.")] = 16,
    seq: Annotated[int | None, typer.Option(min=1, help="Bytes in a sequence.")] = None,
    dropout: Annotated[float | None, typer.Option(min=0.0, max=0.99)] = None,
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
    sample: Annotated[int, typer.Option(min=0, help="Bytes of text to write at the end.")] = 200,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a reference model, partitioned over a mesh.

    The text is the source files of Python's standard library. Where this machine has too few
    accelerators for the mesh, CPU devices stand in for them.
    """
    with plain_errors(debug):
        from gspmd.cli import job, trainer  # with flax and optax, which planning does without

        made = job.make_job(
            model,
            config=config,
            seq=seq,
            dropout=dropout,
            mesh=mesh,
            strategy=strategy,
            batch_size=batch,
            steps=steps,
            seed=seed,
            checkpoints=checkpoint,
            save_every=save_every,
        )
        trainer.train(made, resume=resume, plot=plot, sample=sample, as_json=as_json)


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
