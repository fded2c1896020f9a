"""Tables on wide and narrow terminals."""

import io

import pytest
from rich.text import Text

from app.cli.tables import print_table
from app.tables import Table

TABLE = Table(
    title="Exits",
    columns=("strategy", "exit layer", "loss in nats", "agreement with the full model", "long"),
    rows=[("self_speculative_of_a_long_name", "12 of 30", "3.1234", "71.25%", "a cell that may be broken anywhere")],
)


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.mark.parametrize("width", [40, 80, 100, 200])
def test_no_figure_and_no_word_of_a_header_is_cut(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    print_table(TABLE)
    drawn = Text.from_ansi(terminal.getvalue()).plain
    words = {word for cell in (*TABLE.columns, TABLE.rows[0][4]) for word in cell.split()}
    assert all(cell in drawn for cell in TABLE.rows[0][:4])
    assert all(word in drawn for word in words)
    assert "\N{HORIZONTAL ELLIPSIS}" not in drawn
    assert (max(map(len, drawn.splitlines())) <= width) == (width >= 100)


def test_a_column_without_a_header_and_a_table_without_rows_are_drawn(capsys):
    print_table(Table(title="Exits", columns=("exit", ""), rows=[("1", "best")]))
    assert "best" in capsys.readouterr().out
    print_table(Table(title="Exits", columns=("exit", ""), rows=[]))
    assert "exit" in capsys.readouterr().out


def test_a_file_gets_120_characters(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    print_table(TABLE)
    assert 100 < max(map(len, capsys.readouterr().out.splitlines())) <= 120
