"""A benchmark as a picture: speedup over exits and draft lengths, and which drafts are accepted.

The cost model's predictions are in the table alone: a second line for each exit would hide the measured ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import nan
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from app.benchmark.alternation import sum_columns
from app.benchmark.result import BenchmarkResult

_OF_TRANSFORMERS = "transformers_early_exit"
# How the lines of a strategy that drafts are drawn; without a color they take that of their exit.
_DRAFTING: dict[str, dict[str, Any]] = {
    "self_speculative": {"marker": "o"},
    _OF_TRANSFORMERS: {"marker": "x", "color": "tab:orange", "linestyle": ":"},
    "draft_model": {"marker": "s", "color": "black"},
    "layer_skip": {"marker": "^", "color": "tab:red"},
}
_WITH_N_GRAMS: dict[str, Any] = {"fillstyle": "none"}
_APART = 0.06  # of a draft token: the points of one draft length stand side by side, so that their bars show
_BREAK_EVEN: dict[str, Any] = {"color": "black", "linewidth": 1.0}
_TRANSFORMERS: dict[str, Any] = {"color": "tab:orange", "linestyle": "-."}

Series = tuple[dict[str, Any], list[BenchmarkResult]]  # style, and the results of one strategy and exit


def benchmark_figure(results: Sequence[BenchmarkResult], *, title: str) -> Figure:
    """Draw speedup over draft lengths, and acceptance by position in the draft, with a line for each exit.

    Bars are 95 % intervals. Of transformers' own early exit, the fastest exit at each draft length is drawn.
    """
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    speed_axes, acceptance_axes = figure.subplots(1, 2)
    exits = sorted(
        {r.exit_layer for r in results if r.exit_layer is not None and r.strategy in {*_DRAFTING} - {_OF_TRANSFORMERS}}
    )
    shades = colormaps["viridis"](np.linspace(0.0, 0.85, max(len(exits), 2)))
    colors: dict[int | None, Any] = dict(zip(exits, shades, strict=False))
    groups: dict[tuple[str, int | None, int | None], list[BenchmarkResult]] = {}
    for result in _drafting(results):
        groups.setdefault((result.strategy, result.exit_layer, result.n_gram_match), []).append(result)
    series = [
        ({"color": colors.get(layer)} | _DRAFTING[strategy] | (_WITH_N_GRAMS if match else {}), own)
        for (strategy, layer, match), own in groups.items()
    ]
    if series:
        _draw_speedups(speed_axes, results, series)
    else:
        _draw_bars(speed_axes, results)
    _draw_acceptance(acceptance_axes, series)
    figure.legend(handles=_legend(results, colors), loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    return figure


def _draw_speedups(axes: Axes, results: Sequence[BenchmarkResult], series: Sequence[Series]) -> None:
    for idx, (style, points) in enumerate(series):
        drafts = [(point.num_draft_tokens or 0) + _APART * (idx - (len(series) - 1) / 2) for point in points]
        below_above = [_to_bounds(point) for point in points]
        axes.errorbar(drafts, [point.speedup or nan for point in points], yerr=np.transpose(below_above), **style)
    axes.axhline(1.0, **_BREAK_EVEN)
    for result in results:
        if result.strategy == "transformers" and result.speedup is not None:
            axes.axhline(result.speedup, **_TRANSFORMERS)
    axes.set(
        title="Speedup over autoregressive decoding, with 95 % intervals",
        xlabel="draft tokens a round (at most)",
        ylabel="autoregressive / measured time per token",
        ylim=(0.0, None),
    )
    axes.set_xticks(sorted({point.num_draft_tokens or 0 for _, points in series for point in points}))
    axes.grid(alpha=0.3)


def _draw_bars(axes: Axes, results: Sequence[BenchmarkResult]) -> None:
    """Draw a bar for each result; without drafts there is no draft length to draw lines over."""
    names = [
        r.strategy
        + ("" if r.exit_layer is None else f", exit {r.exit_layer}")
        + ("" if r.n_gram_match is None else f", n-grams of {r.n_gram_match}")
        for r in results
    ]
    axes.barh(names, [result.speedup or 0.0 for result in results], color="tab:gray")
    axes.axvline(1.0, **_BREAK_EVEN)
    axes.invert_yaxis()
    axes.set(title="Speedup over autoregressive decoding", xlabel="autoregressive / measured time per token")


def _draw_acceptance(axes: Axes, series: Sequence[Series]) -> None:
    """Draw all draft lengths as one: what is drafted at a position does not depend on how many drafts come after."""
    for style, points in series:
        accepted = sum_columns(point.accepted_by_position for point in points)
        reached = sum_columns(point.reached_by_position for point in points)
        shares = {1 + i: 100.0 * accepted[i] / count for i, count in enumerate(reached) if count}
        axes.plot(list(shares), list(shares.values()), **style)
    axes.set(
        title="Acceptance by position in the draft",
        xlabel="position in the draft",
        ylabel="accepted, of those with all before them accepted (%)",
        ylim=(0.0, 102.0),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)


def _legend(results: Sequence[BenchmarkResult], colors: Mapping[int | None, Any]) -> list[Line2D]:
    """Explain that colors are exits, and markers and lines are strategies."""
    present = {result.strategy for result in results}
    styles = {f"exit {layer}": {"color": color, "linewidth": 4} for layer, color in colors.items()}
    styles |= {name: {"color": "gray"} | style for name, style in _DRAFTING.items() if name in present}
    if any(result.n_gram_match is not None and result.strategy in _DRAFTING for result in results):
        styles["with n-grams"] = {"color": "gray", "marker": "o"} | _WITH_N_GRAMS
    styles["autoregressive (break-even)"] = _BREAK_EVEN
    if "transformers" in present:
        styles["transformers"] = _TRANSFORMERS
    return [Line2D([], [], label=label, **style) for label, style in styles.items()]


def _drafting(results: Sequence[BenchmarkResult]) -> list[BenchmarkResult]:
    """Return the results that are drawn over draft lengths, ordered by these."""
    drawn = [result for result in results if result.strategy in _DRAFTING and result.speedup is not None]
    fastest: dict[int | None, BenchmarkResult] = {}
    for result in sorted(drawn, key=lambda result: result.speedup or 0.0):
        if result.strategy == _OF_TRANSFORMERS:
            fastest[result.num_draft_tokens] = replace(result, exit_layer=None)
    drawn = [result for result in drawn if result.strategy != _OF_TRANSFORMERS] + [*fastest.values()]
    return sorted(drawn, key=lambda result: result.num_draft_tokens or 0)


def _to_bounds(result: BenchmarkResult) -> tuple[float, float]:
    """Tell how far the bounds of the interval are below and above the speedup; 0 where there is no interval."""
    if result.speedup is None or result.speedup_interval is None:
        return 0.0, 0.0
    low, high = result.speedup_interval
    return max(0.0, result.speedup - low), max(0.0, high - result.speedup)
