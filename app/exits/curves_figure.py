"""What training teaches the exits, as a picture: agreement and loss over tokens, a line style for each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from app.exits.quality import ExitScore

# tokens trained on -> exit_layer -> score
Curve = Mapping[int, Mapping[int, ExitScore]]
_STYLES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
MOST_RUNS = len(_STYLES)


def exit_curves_figure(runs: Mapping[str, Curve]) -> Figure:
    """Agreement with the full model of every early exit, and the loss of the full model, over tokens trained on.

    Args:
        runs: Label -> curve, at most MOST_RUNS; the deepest exit of a curve is the full model.
    """
    figure = Figure(figsize=(11.0, 4.8), layout="constrained")
    agreement_axes, loss_axes = figure.subplots(1, 2, width_ratios=(3, 2))
    full = {label: max(max(scores) for scores in curve.values()) for label, curve in runs.items()}
    exits = sorted({layer for label, curve in runs.items() for scores in curve.values() for layer in scores})
    early = [layer for layer in exits if layer not in full.values()]
    colors = dict(zip(early, mpl.colormaps["viridis"].resampled(max(2, len(early))).colors, strict=False))  # type: ignore[attr-defined]
    for (label, curve), style in zip(runs.items(), _STYLES, strict=False):
        for layer in early:
            points = [(tokens, 100 * scores[layer].agreement) for tokens, scores in curve.items() if layer in scores]
            _line(agreement_axes, points, linestyle=style, color=colors[layer])
        points = [(tokens, scores[full[label]].loss) for tokens, scores in curve.items() if full[label] in scores]
        _line(loss_axes, points, linestyle=style, color="black", label=label)
    agreement_axes.set(title="Early exits", ylabel="agreement with the full model's first choice (%)", ylim=(0, 100))
    loss_axes.set(title="Full model", ylabel="held-out loss (nats a token)")
    for axes in (agreement_axes, loss_axes):
        axes.set(xlabel="tokens trained on (thousands)", xlim=(0, None))
        axes.grid(alpha=0.3)
    by_exit = [Line2D([], [], color=colors[layer], label=f"exit {layer}") for layer in reversed(early)]
    by_run = [
        Line2D([], [], color="black", linestyle=style, label=label) for label, style in zip(runs, _STYLES, strict=False)
    ]
    agreement_axes.legend(handles=[*by_run, *by_exit], frameon=False, ncols=2, loc="upper left")
    return figure


def _line(axes: Axes, points: Sequence[tuple[int, float]], **style: object) -> None:
    tokens, values = zip(*sorted(points), strict=True) if points else ((), ())
    axes.plot([count / 1000 for count in tokens], values, marker="o", markersize=4, **style)  # type: ignore[arg-type]
