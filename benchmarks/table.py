"""Table: rows of text under a title, printed with rich where it is installed."""

import sys
from collections.abc import Sequence
from typing import NamedTuple


class Table(NamedTuple):
    """The first `words` columns and the last are words, those between are numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    width: int = 120  # where the output is no terminal


def show(table: Table) -> None:
    """Prints `table`: with rich where it is installed, in plain columns where it is not."""
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table as RichTable
    except ModuleNotFoundError:
        widths = [max(map(len, column)) for column in zip(table.columns, *table.rows, strict=True)]
        print(f"\n{table.title}")
        for row in (table.columns, *table.rows):
            print("  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip())
        return
    drawn = RichTable(title=table.title, title_justify="left", box=None, pad_edge=False)
    for i, column in enumerate(table.columns):
        is_word = i < table.words or i == len(table.columns) - 1
        drawn.add_column(column, justify="left" if is_word else "right")
    for row in table.rows:
        drawn.add_row(*map(escape, row))
    Console(width=None if sys.stdout.isatty() else table.width, highlight=False).print("", drawn)
