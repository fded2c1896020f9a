"""Plain tables, drawn on the terminal."""

import sys

from rich.console import Console
from rich.table import Table as RichTable

from app.tables import Table

_LONG = 16  # characters; a longer cell may be broken if the table is too wide
_BORDER = 3  # characters that each column takes beside its text


def print_table(table: Table) -> None:
    """Draw the table on stdout, no wider than the terminal, or 120 characters where stdout is no terminal.

    To fit, headers are broken between words and long cells anywhere; a table that is still too wide loses no figure.
    """
    console = Console(width=None if sys.stdout.isatty() else 120)
    cells = [
        max((len(line) for row in table.rows for line in row[index].split("\n")), default=0)
        for index in range(len(table.columns))
    ]
    whole = [max(cell, *map(len, column.split("\n"))) for cell, column in zip(cells, table.columns, strict=True)]
    fits = sum(whole) + _BORDER * len(whole) < console.width
    drawn, needed = RichTable(title=table.title, title_justify="left"), 1
    for index, column in enumerate(table.columns):
        may_break = index > 0 and cells[index] > _LONG
        least = max(_LONG if may_break else cells[index], *map(len, column.split() or [""]))
        width = whole[index] if fits else None if may_break else least
        drawn.add_column(column, justify="right", width=width, min_width=least)
        needed += least + _BORDER
    for row in table.rows:
        drawn.add_row(*row)
    console.width = max(console.width, needed)
    console.print(drawn)
