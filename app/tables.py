"""Plain tables of results. The command line and TensorBoard decide how to draw them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

_ABSENT = "-"


class Table(NamedTuple):
    """A title, the names of the columns, and one row of cells a result."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    @classmethod
    def of_columns(cls, title: str, cells: Mapping[str, Sequence[str]]) -> Self:
        """The table of these columns, without those whose cells are all empty."""
        shown = {name: column for name, column in cells.items() if set(column) != {_ABSENT}}
        return cls(title, tuple(shown), list(zip(*shown.values(), strict=True)))

    def as_markdown(self) -> str:
        """The table below its title, as TensorBoard and GitHub render it."""
        lines = [self.columns, ("---",) * len(self.columns), *self.rows]
        rows = (f"| {' | '.join(cells)} |".replace("\n", " ") for cells in lines)  # a row is a line
        return f"**{self.title}**\n\n" + "\n".join(rows)


def cell(value: float | str | None, style: str) -> str:
    """The value in the format `style`, or the mark of an empty cell where there is none."""
    return _ABSENT if value is None else style.format(value)


def with_interval(value: float, low: float | None, high: float | None, *, is_share: bool) -> str:
    """Write the value with its interval behind it, such as "43.8 (23..67)"; shares are written in percent."""
    scale, style = (100, ".1f") if is_share else (1, ".2f" if value < 1e5 else ".1e")
    text = f"{scale * value:{style}}"
    if low is None or high is None:
        return text
    if is_share:
        style = ".0f" if scale * (high - low) >= 5 else ".1f"
    return f"{text} ({scale * low:{style}}..{scale * high:{style}})"
