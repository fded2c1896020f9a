"""Plain tables, drawn on the terminal."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table as RichTable

from app.protocols import Table


def print_table(table: Table, *, width: int = 120) -> None:
    """Draw the table on stdout, `width` characters wide where that is not a terminal."""
    drawn = RichTable(title=table.title, title_justify="left")
    for column in table.columns:
        drawn.add_column(column, justify="right", no_wrap=column == table.columns[0])
    for row in table.rows:
        drawn.add_row(*row)
    Console(width=None if sys.stdout.isatty() else width).print(drawn)
