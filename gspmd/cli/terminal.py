"""How the command line speaks: results on stdout, complaints on stderr, errors as one sentence."""

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Generator
from typing import Any, TextIO

import typer
from rich.console import Console, RenderableType

from gspmd.errors import GspmdError, StrictError

FINE, LIMIT_BROKEN, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

# The extra that brings a package which the core does without.
EXTRAS = {"flax": "models", "optax": "models", "orbax": "models", "matplotlib": "plot"}


class InputError(GspmdError, ValueError):
    """The command line, or a file that it names, cannot be used."""


def console(file: TextIO) -> Console:
    """Colors and the terminal's width on a terminal, else plain text in lines of any length."""
    return Console(
        file=file,
        width=None if file.isatty() or "COLUMNS" in os.environ else 10_000,
        color_system=None if os.environ.get("NO_COLOR") else "auto",
        highlight=False,
        markup=False,
    )


def say(what: RenderableType) -> None:
    """Prints a result; styled on a terminal, else plain and without blanks at the ends of lines."""
    out = console(sys.stdout)
    if out.is_terminal:
        out.print(what)
        return
    with out.capture() as captured:
        out.print(what)
    print("\n".join(map(str.rstrip, captured.get().splitlines())))  # noqa: T201


def say_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2))  # noqa: T201


def complain(sentence: str) -> None:
    print(f"gspmd: {sentence}", file=sys.stderr)  # noqa: T201


@contextlib.contextmanager
def silent() -> Generator[None]:
    """Drops what Python prints."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


@contextlib.contextmanager
def own_stdout(others: str) -> Generator[None]:
    """Keeps stdout for what Python prints: what native libraries print goes to the file `others`.

    Gloo, which connects CPU devices, tells there of each connection.
    """
    sys.stdout.flush()
    with (
        open(others, "a") as theirs,
        os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding) as ours,
        contextlib.redirect_stdout(ours),
    ):
        os.dup2(theirs.fileno(), 1)
        try:
            yield
        finally:
            ours.flush()
            os.dup2(ours.fileno(), 1)


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
    except KeyboardInterrupt as stopped:
        complain(str(stopped) or "stopped.")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        complain(_sentence(error))
        raise typer.Exit(LIMIT_BROKEN if isinstance(error, StrictError) else BAD_INPUT) from None


def _sentence(error: Exception) -> str:
    if isinstance(error, GspmdError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        return f"this needs {error.name}; run: pip install 'gspmd[{EXTRAS[error.name]}]'"
    first = next(iter(str(error).splitlines()), "")
    name = type(error).__name__
    return f"{name}{': ' * bool(first)}{first} (run again with --debug for the traceback)."


def printable(text: str) -> str:
    """`text` with what would steer a terminal replaced."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
