"""The command line: `commands` says what there is; the rest prepares, runs and shows it."""

from gspmd.cli.commands import app, main

__all__ = ["app", "main"]
