"""How much of a model's exact match is left at early exits, as a picture: a line for each run."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any, Literal

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Metric = Literal["exact_match", "frame_match", "well_formed"]
TITLES: dict[Metric, str] = {
    "exact_match": "exact match (%)",
    "frame_match": "exact match of intents, slots and slot texts (%)",
    "well_formed": "well-formed answers (%)",
}
_MARKERS = "osD^vPX*"  # lines that coincide are told apart, also without color


def exact_match_figure(runs: Mapping[str, Mapping[str, Any]], *, metric: Metric = "exact_match") -> Figure:
    """One line a run over the exits it was decoded at, with one standard error up and down.

    Args:
        runs: Name of a line -> document of `read_report`; what is self-speculative in it is left out.
        metric: What is drawn.
    """
    figure = Figure(figsize=(7.5, 5.0), layout="constrained")
    axes = figure.subplots()
    stages, counts = set(), set()
    for place, (label, document) in enumerate(runs.items()):
        records = [record for record in document["results"] if record["num_draft_tokens"] is None]
        records.sort(key=lambda record: record["exit_layer"])
        exits, shares = [r["exit_layer"] for r in records], [r[metric] for r in records]
        counts |= {r["num_examples"] for r in records}
        stages.add(document["stage"])
        errors = [100.0 * sqrt(s * (1.0 - s) / r["num_examples"]) for s, r in zip(shares, records, strict=True)]
        axes.errorbar(
            exits,
            [100.0 * share for share in shares],
            yerr=errors,
            label=label,
            marker=_MARKERS[place % len(_MARKERS)],
            markersize=7,
            capsize=3,
            alpha=0.85,
        )
    some = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    axes.set(
        title=f"{some} examples ({', '.join(sorted(stages))}); bars: one standard error",
        xlabel="exit layer (blocks run; the last is the full model)",
        ylabel=TITLES[metric],
        xlim=(0.0, None),
        ylim=(-2.0, 102.0),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure
