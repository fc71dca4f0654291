"""The command line: `gspmd plan`, `explain`, `train`, `demo`.

Exit codes: 0 fine, 1 the plan breaks a limit that was asked for, 2 bad usage or input, 130 stopped
by Ctrl-C. An error is one sentence on stderr; `--debug` shows its traceback as well.
"""

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Generator, Iterator
from typing import IO, Annotated, Any

try:
    import typer
    from rich.console import Console, RenderableType
    from rich.text import Text
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"gspmd: the command line needs {missing.name}; run: pip install 'gspmd[cli]'"
    ) from missing

from gspmd.errors import GspmdError, StrictError
from gspmd.load import describe, make_plan, read_bytes, read_rules, read_subject
from gspmd.plan import Plan
from gspmd.show import executions, plan_json, show_bytes, summary

FINE, LIMIT_BROKEN, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

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
            _print_json({**plan_json(made), **text, "broken_limits": broken})
        else:
            _print(summary(made))
            if program:
                _print(Text(f"\n{made}"))
        for sentence in broken:
            _complain(sentence)
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
    """Explain a collective, a source line or an argument: who decided its sharding, and where."""
    with plain_errors(debug):
        made = _plan(target, mesh, rules, strict=False)
        why = str(made.why(int(what) if what.isdecimal() else what))
        if as_json:
            _print_json({"about": what, "why": why})
        else:
            _print(Text(why))


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


@contextlib.contextmanager
def plain_errors(debug: bool) -> Generator[None]:
    """Turns an exception into a sentence on stderr and its exit code."""
    try:
        yield
    except typer.Exit:
        raise
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(FINE) from None
    except KeyboardInterrupt:
        _complain("stopped.")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        _complain(_sentence(error))
        raise typer.Exit(LIMIT_BROKEN if isinstance(error, StrictError) else BAD_INPUT) from None


def _sentence(error: Exception) -> str:
    if isinstance(error, GspmdError):
        return str(error)
    return f"{describe(error)} Run again with --debug for the traceback."


def _complain(sentence: str) -> None:
    print(f"gspmd: {sentence}", file=sys.stderr)  # noqa: T201


def console(file: IO[str] | None = None) -> Console:
    """Colors and the terminal's width on a terminal, else plain text in lines of any length."""
    file = file or sys.stdout
    narrow = file.isatty() or "COLUMNS" in os.environ
    return Console(file=file, width=None if narrow else 10_000, highlight=False, markup=False)


def _print(what: RenderableType) -> None:
    console().print(what)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2))  # noqa: T201
