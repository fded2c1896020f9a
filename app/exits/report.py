"""Shows how good each exit is, as tables and figures."""

from collections.abc import Mapping, Sequence
from typing import Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from app.exits.quality import ExitScore
from app.tables import Table
from app.words import counted

History = Mapping[int, Mapping[int, ExitScore]]  # step, or tokens trained on -> exit_layer -> score
_STYLES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
MOST_RUNS = len(_STYLES)
_MOST_EXITS = 6


def exit_table(history: History, *, num_layers: int, speedups: Mapping[int, float] | None = None) -> Table:
    """Held-out loss of every exit at the first and the last measurement, which may be one, and its latest figures.

    `speedups` has those predicted for early exits, where they are known.
    """
    (first_step, first), (last_step, last) = min(history.items()), max(history.items())
    scores = dict(sorted(last.items()))
    title, latest = "Exits on held-out tokens", "loss"
    cells = {"exit layer": [f"{layer} (full)" if layer == num_layers else str(layer) for layer in scores]}
    if first_step < last_step:
        title, latest = f"{title} after {counted(last_step, 'step')}", f"loss at step {last_step}"
        before = [f"{first[layer].loss:.3f}" if layer in first else "-" for layer in scores]
        cells[f"loss at step {first_step}"] = before
    cells[latest] = [f"{score.loss:.3f}" for score in scores.values()]
    cells["perplexity"] = [f"{score.perplexity:.1f}" for score in scores.values()]
    cells["agreement with full model"] = [f"{score.agreement:.1%}" for score in scores.values()]
    cells["KL to it"] = [f"{score.kl:.3f}" for score in scores.values()]
    cells["acceptance"] = [f"{score.acceptance:.1%}" for score in scores.values()]
    if speedups:
        cells["predicted speedup"] = [f"{speedups[layer]:.2f}x" if layer in speedups else "" for layer in scores]
    return Table.of_columns(title, cells)


def exit_figure(history: History) -> Figure:
    """Heat map of held-out loss over exit and training step, and the latest loss and agreement over exits."""
    steps = sorted(history)
    latest = history[steps[-1]]
    exits = sorted(latest)
    figure = Figure(figsize=(11, 4), layout="constrained")
    heat_axes, curve_axes = figure.subplots(1, 2)
    losses = [
        [history[step][layer].loss if layer in history[step] else float("nan") for step in steps] for layer in exits
    ]
    image = heat_axes.imshow(losses, origin="lower", aspect="auto", cmap="viridis_r", interpolation="nearest")
    shown = range(0, len(steps), max(1, len(steps) // 8))
    heat_axes.set(
        title="Held-out loss (nats a token)",
        xlabel="training step",
        ylabel="exit layer (blocks run)",
        yticks=range(len(exits)),
        yticklabels=exits,
        xticks=list(shown),
        xticklabels=[steps[i] for i in shown],
    )
    figure.colorbar(image, ax=heat_axes)
    curve_axes.plot(exits, [latest[layer].loss for layer in exits], "o-", color="tab:blue")
    curve_axes.set(title=f"Exits at step {steps[-1]}", xlabel="exit layer (blocks run)", xticks=exits)
    curve_axes.set_ylabel("loss (nats a token)", color="tab:blue")
    agreement_axes = curve_axes.twinx()
    agreement_axes.plot(exits, [latest[layer].agreement for layer in exits], "s--", color="tab:orange")
    agreement_axes.set_ylabel("top-1 agreement with the full model", color="tab:orange")
    agreement_axes.set_ylim(0, 1.02)
    return figure


def exit_curves_figure(runs: Mapping[str, History]) -> Figure:
    """Draw early exits' agreement with the full model, and the full model's loss, over tokens trained on.

    `runs` gives the curve for each label, at most MOST_RUNS. The deepest exit of a curve is the full model. Where more
    exits were measured than a reader can tell apart, the picture has some at even distances.
    """
    figure = Figure(figsize=(11.0, 4.8), layout="constrained")
    agreement_axes, loss_axes = figure.subplots(1, 2, width_ratios=(3, 2))
    full = {label: max(max(scores) for scores in curve.values()) for label, curve in runs.items()}
    exits = sorted({layer for label, curve in runs.items() for scores in curve.values() for layer in scores})
    early = [layer for layer in exits if layer not in full.values()]
    stride = -(-(len(early) + 1) // (_MOST_EXITS + 1))
    early = early[stride - 1 :: stride]
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
    styles = zip(runs, _STYLES, strict=False)
    by_run = [Line2D([], [], color="black", linestyle=style, label=label) for label, style in styles]
    handles = [*by_run, *by_exit]
    figure.legend(handles=handles, frameon=False, ncols=len(handles), loc="outside lower center")
    return figure


def _line(axes: Axes, points: Sequence[tuple[int, float]], **style: object) -> None:
    tokens, values = zip(*sorted(points), strict=True) if points else ((), ())
    axes.plot([count / 1000 for count in tokens], values, marker="o", markersize=4, **style)  # type: ignore[arg-type]
