"""Draws scores over exits: shares with the chance of guessing, and perplexities. Tested by test_results.py."""

from collections.abc import Iterator, Sequence
from itertools import cycle, pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from app.evaluation.results import Result, column

_MARKERS = "osD^vPX*"  # they tell lines apart that coincide
_MOST = 1e100  # a perplexity beyond it would overflow on a logarithmic scale


def evaluation_figure(results: Sequence[Result], *, title: str) -> Figure:
    """One line for each task over the exits, with its 95 % intervals.

    Args:
        results: Those that are to be seen (`results.shown`).
        title: What was measured.
    """
    shares = [each for each in results if each.metric != "perplexity"]
    texts = [each for each in results if each.metric == "perplexity"]
    panels = [panel for panel in (shares, texts) if panel]
    figure = Figure(figsize=(7.0 * max(1, len(panels)), 5.2), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    if not panels:  # no row was short enough for the model
        return figure
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _lines(axes, panel)
        axes.set_xlabel("exit layer (blocks run; the last is the full model)")
        exits = sorted({each.exit_layer for each in results})
        axes.set_xticks(exits) if len(exits) <= 12 else axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if panel is shares:
            axes.set(ylabel="score (%), with 95 % intervals", ylim=(0, None))
        else:
            axes.set(ylabel="perplexity of a token (lower is better), with 95 % intervals", yscale="log")
            if max(each.score for each in texts) < 1000 * min(each.score for each in texts):
                axes.yaxis.set_major_formatter(ScalarFormatter())
    return figure


def _shifts(results: Sequence[Result]) -> Iterator[float]:
    """How far each line stands beside its exits, in blocks: intervals at one place would cover one another."""
    exits = sorted({each.exit_layer for each in results})
    num_lines = len({(column(each), each.strategy == "self_speculative") for each in results})
    closest = min((high - low for low, high in pairwise(exits)), default=1)
    step = min(max(1, exits[-1] - exits[0]) / 80, closest / (2 * num_lines))
    return (step * (index - (num_lines - 1) / 2) for index in range(num_lines))


def _lines(axes: Axes, results: Sequence[Result]) -> None:
    colors = cycle(mpl.colormaps["tab10"].colors)  # type: ignore[attr-defined]
    handles = []
    shifts = _shifts(results)
    for name, color, marker in zip(dict.fromkeys(map(column, results)), colors, cycle(_MARKERS), strict=False):
        own = [each for each in results if column(each) == name]
        scale = 1.0 if own[0].metric == "perplexity" else 100.0
        style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 6, "capsize": 3, "alpha": 0.85}
        label = name if scale == 1.0 else f"{name} ({own[0].metric})"
        for drafts in (False, True):
            line = [each for each in own if (each.strategy == "self_speculative") == drafts]
            if line:
                line.sort(key=lambda each: each.exit_layer)
                dashed = {"linestyle": ":", "fillstyle": "none"} if drafts else {}
                shift = next(shifts)
                points = [each.exit_layer + shift for each in line], [min(scale * each.score, _MOST) for each in line]
                bounds = [(each.score if bound is None else bound for bound in (each.low, each.high)) for each in line]
                lows, highs = zip(*([min(scale * bound, _MOST) for bound in each] for each in bounds), strict=True)
                errors = np.abs(np.array([lows, highs]) - points[1])
                axes.errorbar(*points, yerr=errors, **(style | dashed))
                for point, each in zip(zip(*points, strict=True), line, strict=True):
                    if each.speedup is not None:
                        note: dict[str, Any] = {"textcoords": "offset points", "color": color, "fontsize": "small"}
                        axes.annotate(f"{each.speedup:.1f}x", point, xytext=(5, 4), **note)
        handles.append(Line2D([], [], color=color, marker=marker, label=label))
        if (chance := own[0].chance) is not None:
            axes.axhline(scale * chance, color=color, linestyle="--", linewidth=1, alpha=0.6)
    grey: dict[str, Any] = {"color": "grey", "marker": "o"}
    if any(each.chance is not None for each in results):
        handles.append(
            Line2D([], [], color="grey", linestyle="--", linewidth=1, label="guessing, in the task's colour")
        )
    if any(each.strategy == "early_exit" for each in results):
        handles.append(Line2D([], [], **grey, label="generated: early exit (lossy)"))
    if any(each.strategy == "self_speculative" for each in results):
        label = "generated: self-speculative (lossless), speedup"
        handles.append(Line2D([], [], **grey, linestyle=":", fillstyle="none", label=label))
    axes.legend(
        handles=handles, frameon=False, ncols=2, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.13)
    )
