"""Plain tables, drawn on the terminal."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table as RichTable

from app.tables import Table

_LONG = 16  # characters of a cell that may be broken where the table is too wide
_BORDER = 3  # characters beside those of each column


def print_table(table: Table) -> None:
    """Draw the table on stdout, at most as wide as that is (120 characters where it is no terminal).

    To fit, headers are broken between words and long cells anywhere. What is still too wide stays so: a terminal breaks
    the lines, but no figure is lost.
    """
    console = Console(width=None if sys.stdout.isatty() else 120)
    cells = [max((len(row[place]) for row in table.rows), default=0) for place in range(len(table.columns))]
    whole = [max(cell, *map(len, column.split("\n"))) for cell, column in zip(cells, table.columns, strict=True)]
    fits = sum(whole) + _BORDER * len(whole) < console.width
    drawn, needed = RichTable(title=table.title, title_justify="left"), 1
    for place, column in enumerate(table.columns):
        may_break = place > 0 and cells[place] > _LONG
        least = max(_LONG if may_break else cells[place], *map(len, column.split() or [""]))
        width = whole[place] if fits else None if may_break else least
        drawn.add_column(column, justify="right", width=width, min_width=least)
        needed += least + _BORDER
    for row in table.rows:
        drawn.add_row(*row)
    console.width = max(console.width, needed)
    console.print(drawn)
