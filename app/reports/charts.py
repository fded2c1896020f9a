"""Line charts as SVG, whose colors the page sets, so that they follow light and dark mode.

matplotlib chooses the ticks. Its own SVG has fixed colors, and glyphs as paths, which no screen reader can read.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from matplotlib.ticker import MaxNLocator

from app.reports.scalars import Series

MOST_EXITS = 6
_MOST_POINTS = 300  # of a line; more are drawn as the means of so many intervals
_FEW_POINTS = 16  # which are marked
_WIDTH, _PLOT_HEIGHT, _LEFT, _TOP, _BOTTOM = 420, 230, 46, 26, 40
_RIGHT = 24  # half of the longest label, 100,000, where a tick is at the end of the x axis
_LEGEND_ROW, _SWATCH, _LETTER, _DIGIT = 20, 30, 6.6, 7.7


Points = Series | Mapping[float, float]


@dataclass(frozen=True)
class Line:
    """A line of a chart. `style` is a class of the style sheet: run-0, run-1 ...; exit-0, exit-1 ...; or full."""

    label: str
    style: str
    points: Points


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What a chart shows. The y axis is in percent where `in_percent`; the points are shares then."""

    name: str  # of its file
    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    in_percent: bool = False
    also_in_range: Sequence[float] = ()  # values that the y axis reaches, so that charts compare
    source: str = ""  # where its figures are from

    @property
    def description(self) -> str:
        """What the lines show, for who cannot see them."""
        return f"{self.y_label} over {self.x_label}. " + " ".join(map(self._in_words, self.lines))

    @property
    def note(self) -> str:
        """How many points are drawn as one, where that is so."""
        most = max((len(line.points) for line in self.lines), default=0)
        return f"Lines are means of {_MOST_POINTS} intervals. " if most > _MOST_POINTS else ""

    def _in_words(self, line: Line) -> str:
        known = [(x, y) for x, y in line.points.items() if math.isfinite(y)]
        if not known:
            return f"{line.label}: no finite value."
        (first_x, first), (last_x, last) = known[0], known[-1]
        return f"{line.label}: {self._value(first)} at {first_x:g}, {self._value(last)} at {last_x:g}."

    def _value(self, y: float) -> str:
        return f"{y:.1%}" if self.in_percent else f"{y:.4g}"


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A chart in the coordinates of its SVG."""

    chart: Chart
    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    paths: Sequence[tuple[str, str, Sequence[tuple[float, float, str]]]]  # style, path, marks with their words
    legend: Sequence[tuple[float, float, str, str]]  # x, y, style, label


def draw(chart: Chart) -> Drawing:
    """Lay a chart out. Values that are not finite leave a gap."""
    lines = [(line, _thinned(line.points)) for line in chart.lines]
    xs = [x for _, points in lines for x in points]
    ys = [y for _, points in lines for y in points.values() if math.isfinite(y)] + [*chart.also_in_range]
    x_ticks, y_ticks = _ticks(xs, integer=True), [0.0, 0.25, 0.5, 0.75, 1.0] if chart.in_percent else _ticks(ys)
    bottom, right = _TOP + _PLOT_HEIGHT, _WIDTH - _RIGHT
    x_low, x_high = min(xs, default=0.0), max(xs, default=1.0)
    y_low, y_high = min([*ys, y_ticks[0]]), max([*ys, y_ticks[-1]])
    y_labels = [f"{y:.0%}" if chart.in_percent else f"{y:g}" for y in y_ticks]
    left = max(_LEFT, 8 + math.ceil(_DIGIT * max(map(len, y_labels))))

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / ((x_high - x_low) or 1.0)
        up = (y - y_low) / ((y_high - y_low) or 1.0)
        return round(left + across * (right - left), 1), round(bottom - up * _PLOT_HEIGHT, 1)

    paths = []
    for line, points in lines:
        marks = [
            (*at(x, y), f"{line.label}: {chart._value(y)} at {x:g}") for x, y in points.items() if math.isfinite(y)
        ]
        path, is_gap = "", True
        for x, y in points.items():
            if math.isfinite(y):
                path += f"{'M' if is_gap else 'L'}{at(x, y)[0]} {at(x, y)[1]}"
            is_gap = not math.isfinite(y)
        paths.append((line.style, path, marks if len(points) <= _FEW_POINTS else []))
    legend = _legend(chart.lines, bottom + _BOTTOM + 8) if len(lines) > 1 else []
    return Drawing(
        chart=chart,
        width=_WIDTH,
        height=bottom + _BOTTOM + (round(legend[-1][1]) - bottom - _BOTTOM + 12 if legend else 0),
        left=left,
        right=right,
        top=_TOP,
        bottom=bottom,
        x_ticks=[(at(x, 0.0)[0], f"{x:,g}") for x in x_ticks if x_low <= x <= x_high],
        y_ticks=[(at(0.0, y)[1], label) for y, label in zip(y_ticks, y_labels, strict=True)],
        paths=paths,
        legend=legend,
    )


def some_exits(exits: Sequence[int], *, num_layers: int) -> dict[int, str]:
    """The exits that are drawn, at even distances where there are many, each with its style; the full model is last."""
    early = [layer for layer in exits if layer < num_layers]
    stride = -(-(len(early) + 1) // (MOST_EXITS + 1))
    early = early[stride - 1 :: stride]
    shades = [round(i * (MOST_EXITS - 1) / max(1, len(early) - 1)) for i in range(len(early))]
    return dict(zip(early, (f"exit-{shade}" for shade in shades), strict=True)) | {num_layers: "full"}


def _ticks(values: Sequence[float], *, integer: bool = False) -> list[float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    if low == high and not integer:
        low, high = low - 0.5, high + 0.5
    return [float(tick) for tick in MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=integer).tick_values(low, high)]


def _thinned(points: Points) -> Mapping[float, float]:
    """The points, or the means of even intervals of them where they are many."""
    if len(points) <= _MOST_POINTS:
        return {float(x): y for x, y in points.items()}
    items = [(x, y) for x, y in points.items() if math.isfinite(y)]
    cuts = [round(i * len(items) / _MOST_POINTS) for i in range(_MOST_POINTS + 1)]
    parts = [items[start:stop] for start, stop in pairwise(cuts) if start < stop]
    return {fmean(x for x, _ in part): fmean(y for _, y in part) for part in parts}


def _legend(lines: Sequence[Line], y: float) -> list[tuple[float, float, str, str]]:
    placed, x = [], float(_LEFT)
    for line in lines:
        width = _SWATCH + _LETTER * len(line.label) + 12
        if x > _LEFT and x + width > _WIDTH:
            x, y = float(_LEFT), y + _LEGEND_ROW
        placed.append((round(x, 1), y, line.style, line.label))
        x += width
    return placed
