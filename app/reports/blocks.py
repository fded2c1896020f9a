"""What a report is made of; the templates say how it looks. Tested by tests/unit/reports/test_report.py."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from app.reports.charts import Chart
from app.tables import Table


@dataclass(frozen=True, kw_only=True)
class Prose:
    """A sentence or two."""

    kind: ClassVar = "prose"
    text: str


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A part that cannot be shown, and the command that would make it."""

    kind: ClassVar = "missing"
    what: str
    command: str


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A table with its source.

    Attributes:
        shades: -1..1 for each cell that is colored, by row and column.
        marked_rows: Rows that stand out.
        in_words: Whether the cells are texts, which are read from the left.
        is_folded: Whether the reader has to unfold it.
    """

    kind: ClassVar = "sheet"
    table: Table
    source: str = ""
    command: str = ""
    shades: dict[tuple[int, int], float] = field(default_factory=dict)
    marked_rows: frozenset[int] = frozenset()
    in_words: bool = False
    is_folded: bool = False


@dataclass(frozen=True, kw_only=True)
class Charts:
    """Charts side by side, which one command made."""

    kind: ClassVar = "charts"
    charts: Sequence[Chart]


@dataclass(frozen=True, kw_only=True)
class Folded:
    """A long text that the reader unfolds."""

    kind: ClassVar = "folded"
    title: str
    text: str


Block = Prose | Missing | Sheet | Charts | Folded


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the report with a heading."""

    name: str  # of its anchor
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True, kw_only=True)
class Report:
    """A whole report."""

    title: str
    subtitle: str
    made: str  # when, and by which version
    notes: Sequence[str]
    sections: Sequence[Section]
