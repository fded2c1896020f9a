"""What `layerskip tune` found, as plain tables and as one object."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from app.evaluation.tuning import Tuning
from app.protocols import Table


def exits_table(tuning: Tuning) -> Table:
    """Every exit with the draft length that is predicted to be fastest from it."""
    agreement = tuning.agreement
    rows: list[tuple[str, ...]] = []
    for exit_layer in range(1, agreement.num_layers):
        best = tuning.best_of_exit(exit_layer)
        rows.append(
            (
                str(exit_layer),
                f"{agreement.agreement(exit_layer):.1%}",
                str(best.num_draft_tokens),
                _share(best.acceptance_rate),
                f"{best.mean_tokens_per_round:.2f}",
                f"{best.speedup:.2f}x",
            )
        )
    full = f"{agreement.num_layers} (full, one pass)"
    rows.append((full, f"{agreement.agreement(agreement.num_layers):.1%}", "-", "-", "-", "-"))
    title = (
        f"Exits on {agreement.num_positions} tokens of the model's own output ({len(agreement.outputs)} prompts), mean"
        f" saturation layer {agreement.mean_saturation_layer:.1f}"
    )
    return Table(
        title,
        ("exit", "agreement", "best drafts", "acceptance", "tokens/round", "predicted"),
        rows,
    )


def verifications_table(tuning: Tuning) -> Table:
    """Every setting that was run against autoregressive decoding."""
    rows: list[tuple[str, ...]] = [
        (
            str(run.prediction.exit_layer),
            str(run.prediction.num_draft_tokens),
            _share(run.acceptance_rate),
            f"{run.mean_tokens_per_round:.2f}",
            f"{run.prediction.speedup:.2f}x",
            f"{run.speedup:.2f}x",
            "{:.2f}..{:.2f}x".format(*run.speedup_range),
            f"{run.identical_share:.0%}",
        )
        for run in tuning.verifications
    ]
    return Table(
        f"Run in turn with autoregressive decoding, {tuning.best.num_prompts} prompts",
        ("exit", "drafts", "acceptance", "tokens/round", "predicted", "measured", "of single repeats", "identical"),
        rows,
    )


def costs_line(tuning: Tuning) -> str:
    """The measured costs, in one line."""
    costs = tuning.costs
    return (
        f"a block takes {costs.block_seconds * 1e6:.0f} us at one token; in blocks: the rest of a step"
        f" (H) {costs.head:.2f}, a round's overhead {costs.overhead:.2f}; each further position adds"
        f" {costs.extra_token:.1%} of a pass (k)"
    )


def tuning_as_json(tuning: Tuning) -> dict[str, Any]:
    """Everything in the tables, and the recommendation."""
    agreement = tuning.agreement
    return {
        **asdict(tuning.defaults),
        "reason": tuning.reason,
        "costs": asdict(tuning.costs),
        "num_prompts": len(agreement.outputs),
        "num_positions": agreement.num_positions,
        "mean_saturation_layer": agreement.mean_saturation_layer,
        "exits": [
            {
                "exit_layer": exit_layer,
                "agreement": agreement.agreement(exit_layer),
                "best": asdict(tuning.best_of_exit(exit_layer)) if exit_layer < agreement.num_layers else None,
            }
            for exit_layer in range(1, agreement.num_layers + 1)
        ],
        "verified": [asdict(run) for run in tuning.verifications],
    }


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
