"""A benchmark as a picture: speedup over exits and draft lengths, and which drafts are accepted."""

from collections.abc import Iterable, Mapping, Sequence
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

# How the lines of a strategy that drafts are drawn; without a color they take that of their exit.
_DRAFTING: dict[str, dict[str, Any]] = {
    "self_speculative": {"marker": "o"},
    "transformers_early_exit": {"marker": "x", "linestyle": ":"},
    "draft_model": {"marker": "s", "color": "black"},
    "layer_skip": {"marker": "^", "color": "tab:red"},
}
_WITH_N_GRAMS: dict[str, Any] = {"fillstyle": "none"}
_PREDICTED: dict[str, Any] = {"linestyle": "--", "marker": "_", "markersize": 9, "linewidth": 1.0}
_BREAK_EVEN: dict[str, Any] = {"color": "black", "linewidth": 1.0}
_TRANSFORMERS: dict[str, Any] = {"color": "tab:orange", "linestyle": "-."}

Series = tuple[dict[str, Any], list[BenchmarkResult]]  # style, and the results of one strategy and exit


def benchmark_figure(results: Sequence[BenchmarkResult], *, title: str) -> Figure:
    """Draw speedup over draft lengths, and acceptance by position in the draft, with a line for each exit."""
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    speed_axes, acceptance_axes = figure.subplots(1, 2)
    exits = sorted({r.exit_layer for r in results if r.exit_layer is not None and r.strategy in _DRAFTING})
    shades = colormaps["viridis"](np.linspace(0.0, 0.85, max(len(exits), 2)))
    colors: dict[int | None, Any] = dict(zip(exits, shades, strict=False))
    groups: dict[tuple[str, int | None, int | None], list[BenchmarkResult]] = {}
    for result in sorted(results, key=lambda result: result.num_draft_tokens or 0):
        if result.strategy in _DRAFTING and result.speedup is not None:
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
    for style, points in series:
        drafts = _numbers(point.num_draft_tokens for point in points)
        axes.plot(drafts, _numbers(point.speedup for point in points), **style)
        axes.plot(drafts, _numbers(point.predicted_speedup for point in points), color=style["color"], **_PREDICTED)
    axes.axhline(1.0, **_BREAK_EVEN)
    for result in results:
        if result.strategy == "transformers" and result.speedup is not None:
            axes.axhline(result.speedup, **_TRANSFORMERS)
    axes.set(
        title="Speedup over autoregressive decoding",
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
    if any(result.predicted_speedup is not None for result in results):
        styles["predicted by the cost model"] = {"color": "gray"} | _PREDICTED
    styles["autoregressive (break-even)"] = _BREAK_EVEN
    if "transformers" in present:
        styles["transformers"] = _TRANSFORMERS
    return [Line2D([], [], label=label, **style) for label, style in styles.items()]


def _numbers(values: Iterable[float | None]) -> list[float]:
    """Return the values as numbers; an unknown one is nan, which leaves a gap in the line."""
    return [nan if value is None else float(value) for value in values]
