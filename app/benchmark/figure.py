"""A benchmark as a picture: speedup over exits and draft lengths, and which drafts are accepted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from math import nan
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from app.benchmark.result import BenchmarkResult

_AUTOREGRESSIVE = "autoregressive (break-even)"


class _Style(NamedTuple):
    """How a strategy that drafts is drawn; without a color it takes that of its exit."""

    label: str
    marker: str
    line: Literal["-", ":"] = "-"
    color: str = ""


class _Series(NamedTuple):
    """A line of the figure: the results of one strategy and exit by draft length."""

    style: _Style
    color: Any
    points: list[BenchmarkResult]


_DRAFTING = {
    "self_speculative": _Style("self_speculative", "o"),
    "transformers_early_exit": _Style("transformers_early_exit", "x", ":"),
    "draft_model": _Style("draft_model", "s", color="black"),
    "layer_skip": _Style("layer_skip", "^", color="tab:red"),
}
_PREDICTED: dict[str, Any] = {"linestyle": "--", "marker": "_", "markersize": 9, "linewidth": 1.0}


def benchmark_figure(results: Sequence[BenchmarkResult], *, title: str) -> Figure:
    """Speedup over draft lengths, and acceptance by position in the draft, in two panels with a line for each exit."""
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    speed_axes, acceptance_axes = figure.subplots(1, 2)
    exits = sorted({r.exit_layer for r in results if r.exit_layer is not None and r.strategy in _DRAFTING})
    shades = colormaps["viridis"](np.linspace(0.0, 0.85, max(len(exits), 2)))
    colors = dict(zip(exits, shades, strict=False))
    series = _series(results, colors)
    if series:
        _draw_speedups(speed_axes, results, series)
    else:
        _draw_bars(speed_axes, results)
    _draw_acceptance(acceptance_axes, series)
    figure.legend(handles=_legend(results, colors), loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    return figure


def _series(results: Sequence[BenchmarkResult], colors: Mapping[int, Any]) -> list[_Series]:
    groups: dict[tuple[str, int | None], list[BenchmarkResult]] = {}
    for result in results:
        if result.strategy in _DRAFTING and result.speedup is not None:
            groups.setdefault((result.strategy, result.exit_layer), []).append(result)
    return [
        _Series(
            _DRAFTING[strategy],
            _DRAFTING[strategy].color if exit_layer is None else colors[exit_layer],
            sorted(points, key=lambda point: point.num_draft_tokens or 0),
        )
        for (strategy, exit_layer), points in groups.items()
    ]


def _draw_speedups(axes: Axes, results: Sequence[BenchmarkResult], series: Sequence[_Series]) -> None:
    for style, color, points in series:
        drafts = _numbers(point.num_draft_tokens for point in points)
        speedups = _numbers(point.speedup for point in points)
        axes.plot(drafts, speedups, color=color, marker=style.marker, linestyle=style.line)
        axes.plot(drafts, _numbers(point.predicted_speedup for point in points), color=color, **_PREDICTED)
    axes.axhline(1.0, color="black", linewidth=1.0)
    for result in results:
        if result.strategy == "transformers" and result.speedup is not None:
            axes.axhline(result.speedup, color="tab:orange", linestyle="-.")
    axes.set(
        title="Speedup over autoregressive decoding",
        xlabel="draft tokens a round (at most)",
        ylabel="autoregressive / measured time per token",
        ylim=(0.0, None),
    )
    axes.set_xticks(sorted({point.num_draft_tokens or 0 for _, _, points in series for point in points}))
    axes.grid(alpha=0.3)


def _draw_bars(axes: Axes, results: Sequence[BenchmarkResult]) -> None:
    """Draw a bar for each result; without drafts there is no draft length to draw lines over."""
    names = [r.strategy if r.exit_layer is None else f"{r.strategy}, exit {r.exit_layer}" for r in results]
    axes.barh(names, [result.speedup or 0.0 for result in results], color="tab:gray")
    axes.axvline(1.0, color="black", linewidth=1.0)
    axes.invert_yaxis()
    axes.set(title="Speedup over autoregressive decoding", xlabel="autoregressive / measured time per token")


def _draw_acceptance(axes: Axes, series: Sequence[_Series]) -> None:
    """Draw all draft lengths as one: what is drafted at a position does not depend on how many drafts come after."""
    for style, color, points in series:
        reached, accepted = (
            [sum(column) for column in zip_longest(*rows, fillvalue=0)]
            for rows in zip(*((p.reached_by_position, p.accepted_by_position) for p in points), strict=True)
        )
        positions = [position for position, count in enumerate(reached) if count]
        shares = [100.0 * accepted[position] / reached[position] for position in positions]
        axes.plot([p + 1 for p in positions], shares, color=color, marker=style.marker, linestyle=style.line)
    axes.set(
        title="Acceptance by position in the draft",
        xlabel="position in the draft",
        ylabel="accepted, of those with all before them accepted (%)",
        ylim=(0.0, 102.0),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)


def _legend(results: Sequence[BenchmarkResult], colors: Mapping[int, Any]) -> list[Line2D]:
    """Explain that colors are exits, and markers and lines are strategies."""
    present = {result.strategy for result in results}
    handles = [Line2D([], [], color=color, linewidth=4, label=f"exit {layer}") for layer, color in colors.items()]
    for strategy, style in _DRAFTING.items():
        if strategy in present:
            color = style.color or "gray"
            handles.append(Line2D([], [], color=color, marker=style.marker, linestyle=style.line, label=style.label))
    if any(result.predicted_speedup is not None for result in results):
        handles.append(Line2D([], [], color="gray", label="predicted by the cost model", **_PREDICTED))
    handles.append(Line2D([], [], color="black", linewidth=1.0, label=_AUTOREGRESSIVE))
    if "transformers" in present:
        handles.append(Line2D([], [], color="tab:orange", linestyle="-.", label="transformers"))
    return handles


def _numbers(values: Iterable[float | None]) -> list[float]:
    """The values as numbers; an unknown one is nan, which leaves a gap in the line."""
    return [nan if value is None else float(value) for value in values]
