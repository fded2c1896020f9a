"""Shows how good each exit is, as tables and figures."""

from collections.abc import Mapping
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from app.exits.quality import ExitScore
from app.tables import Table
from app.words import counted

History = Mapping[int, Mapping[int, ExitScore]]  # step, or tokens trained on -> exit_layer -> score
CurveMetric = Literal["agreement", "acceptance"]
_CURVE_TITLES: dict[CurveMetric, str] = {
    "agreement": "agreement with the full model's first choice (%)",
    "acceptance": "chance that a sampled draft is accepted, 1 - TV (%)",
}
_STYLES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
MOST_RUNS = len(_STYLES)
_MARKERS = "osD^vPX*"  # of runs, beside their colors
MOST_COLORED_RUNS = len(_MARKERS)
_MOST_EXITS = 6
_CARD = (4.0, 3.2)  # inches: TensorBoard shows pictures about 350 pixels wide


def exit_table(history: History, *, num_layers: int, speedups: Mapping[int, float] | None = None) -> Table:
    """Held-out loss of every exit at the first and the last measurement, its latest figures, and known `speedups`."""
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


def gap_figure(history: History) -> Figure:
    """Draw a heat map of how much more loss each exit has than the deepest, the full model, over training steps."""
    steps = sorted(history)
    exits = sorted({layer for scores in history.values() for layer in scores})
    gaps = [[_gap(history[step], layer) for step in steps] for layer in exits]
    figure = Figure(figsize=_CARD, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(gaps, origin="lower", aspect="auto", cmap="viridis_r", interpolation="nearest")
    rows, columns = _spread(len(exits), most=8), _spread(len(steps), most=5)
    axes.set(
        title="Loss above the full model's",
        xlabel="training step",
        ylabel="exit layer (blocks run)",
        yticks=rows,
        yticklabels=[exits[row] for row in rows],
        xticks=columns,
        xticklabels=[_short(steps[column]) for column in columns],
    )
    figure.colorbar(image, ax=axes, label="nats a token")
    return figure


def exit_figure(history: History) -> Figure:
    """Draw how much more loss each exit has than the full model at last, and how often it agrees with it."""
    step = max(history)
    latest = dict(sorted(history[step].items()))
    figure = Figure(figsize=_CARD, layout="constrained")
    axes = figure.subplots()
    axes.plot(list(latest), [_gap(latest, layer) for layer in latest], "o-", color="tab:blue", markersize=4)
    axes.set(title=f"Exits after step {step}", xlabel="exit layer (blocks run)")
    axes.set_ylabel("loss above the full model's", color="tab:blue")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    agreement_axes = axes.twinx()
    agreement = [100 * score.agreement for score in latest.values()]
    agreement_axes.plot(list(latest), agreement, "s--", color="tab:orange", markersize=4)
    agreement_axes.set_ylabel("same first choice (%)", color="tab:orange")
    agreement_axes.set_ylim(0, 102)
    return figure


def _gap(scores: Mapping[int, ExitScore], layer: int) -> float:
    """Return how much more loss an exit has than the full model, in nats a token; NaN if it was not measured."""
    return scores[layer].loss - scores[max(scores)].loss if layer in scores else float("nan")


def _spread(count: int, *, most: int) -> list[int]:
    """Return up to `most` of the indices 0..count-1, the last among them, at even distances."""
    stride = -(-count // most)
    return list(range((count - 1) % stride, count, stride))


def _short(step: int) -> str:
    return f"{step // 1000}k" if step >= 10_000 and step % 1000 == 0 else str(step)


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
            _line(agreement_axes, curve, layer, "agreement", linestyle=style, color=colors[layer])
        _line(loss_axes, curve, full[label], "loss", linestyle=style, color="black", label=label)
    _set_over_tokens(agreement_axes, title="Early exits", ylabel=_CURVE_TITLES["agreement"], ylim=(0, 100))
    _set_over_tokens(loss_axes, title="Full model", ylabel="held-out loss (nats a token)")
    by_exit = [Line2D([], [], color=colors[layer], label=f"exit {layer}") for layer in reversed(early)]
    styles = zip(runs, _STYLES, strict=False)
    by_run = [Line2D([], [], color="black", linestyle=style, label=label) for label, style in styles]
    handles = [*by_run, *by_exit]
    figure.legend(handles=handles, frameon=False, ncols=len(handles), loc="outside lower center")
    return figure


def early_exits_figure(runs: Mapping[str, History], *, metric: CurveMetric) -> Figure:
    """Draw one metric of the early exits alone over tokens trained on: each run has a color, each exit a line style.

    `runs` gives the scores of early exits for each label, at most MOST_COLORED_RUNS. Of each run at most MOST_RUNS
    exits are drawn, at even distances.
    """
    figure = Figure(figsize=(7.5, 5.2), layout="constrained")
    axes = figure.subplots()
    looks = zip(mpl.color_sequences["tab10"], _MARKERS, strict=False)
    for (label, curve), (color, marker) in zip(runs.items(), looks, strict=False):
        exits = sorted({layer for scores in curve.values() for layer in scores})
        for row, style in zip(reversed(_spread(len(exits), most=MOST_RUNS)), _STYLES, strict=False):
            look = {"linestyle": style, "color": color, "marker": marker, "label": f"{label}, exit {exits[row]}"}
            _line(axes, curve, exits[row], metric, **look)
    _set_over_tokens(axes, ylabel=_CURVE_TITLES[metric], ylim=(0, None))
    figure.legend(frameon=False, ncols=2, loc="outside lower center")
    return figure


def scaling_figure(runs: Mapping[str, History], *, exit_layer: int) -> Figure:
    """Draw the perplexity of an exit, and the full model's, over tokens (the paper's Fig. 11), of at most MOST_RUNS."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for (label, curve), style in zip(runs.items(), _STYLES, strict=False):
        full = max(max(scores) for scores in curve.values())
        for layer, color, name in ((exit_layer, "tab:red", f"exit {exit_layer}"), (full, "black", "full model")):
            _line(axes, curve, layer, "perplexity", linestyle=style, color=color, label=f"{label}, {name}")
    _set_over_tokens(axes, ylabel="held-out perplexity", yscale="log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    figure.legend(frameon=False, ncols=2, loc="outside lower center")
    return figure


def _line(axes: Axes, curve: History, layer: int, metric: str, **style: Any) -> None:
    """Draw a metric of an exit over tokens; those of CurveMetric as percentages."""
    unit = 100 if metric in _CURVE_TITLES else 1
    measured = {tokens: scores[layer] for tokens, scores in sorted(curve.items()) if layer in scores}
    values = [unit * getattr(score, metric) for score in measured.values()]
    axes.plot([tokens / 1000 for tokens in measured], values, **{"marker": "o", "markersize": 4, **style})


def _set_over_tokens(axes: Axes, **settings: Any) -> None:
    axes.set(xlabel="tokens trained on (thousands)", xlim=(0, None), **settings)
    axes.grid(alpha=0.3, which="both")
