"""Plain tables, drawn on the terminal."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table as RichTable

from app.protocols import Table

_LONG = 16  # characters of a cell that may be broken where the table is too wide


def print_table(table: Table) -> None:
    """Draw the table on stdout, at most 120 characters wide where that is not a terminal."""
    drawn = RichTable(title=table.title, title_justify="left")
    for place, column in enumerate(table.columns):
        long = place > 0 and max((len(row[place]) for row in table.rows), default=0) > _LONG
        drawn.add_column(column, justify="right", no_wrap=not long)
    for row in table.rows:
        drawn.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(drawn)
