"""Results as plain tables and figures."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from app.exits.quality import ExitScore
from app.tables import Table
from app.words import counted

History = Mapping[int, Mapping[int, ExitScore]]  # step -> exit_layer -> score


def exit_table(history: History, *, num_layers: int) -> Table:
    """Held-out loss of every exit at the first and the last measurement (one column if it is one), and agreement."""
    (first_step, first), (last_step, last) = min(history.items()), max(history.items())
    trend = first_step < last_step
    rows = []
    for layer, score in sorted(last.items()):
        before = (f"{first[layer].loss:.3f}" if layer in first else "-",) if trend else ()
        name = f"{layer} (full)" if layer == num_layers else str(layer)
        rows.append((name, *before, f"{score.loss:.3f}", f"{score.perplexity:.1f}", f"{score.agreement:.1%}"))
    return Table(
        title=f"Exits on held-out tokens after {counted(last_step, 'step')}" if trend else "Exits on held-out tokens",
        columns=(
            "exit layer",
            *((f"loss at step {first_step}",) if trend else ()),
            f"loss at step {last_step}" if trend else "loss",
            "perplexity",
            "agreement with full model",
        ),
        rows=rows,
    )


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
