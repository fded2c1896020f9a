"""What `layerskip tune` found, as tables and as one JSON object."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from app.benchmark.speedup_interval import interval_in_words
from app.tables import Table, cell
from app.tuning.result import Tuning, Verification
from app.words import counted


def exits_table(tuning: Tuning) -> Table:
    """Every exit with the draft length that is predicted to be fastest from it."""
    agreement, num_layers = tuning.agreement, tuning.agreement.num_layers
    best = [tuning.best_of_exit(exit_layer) for exit_layer in range(1, num_layers)]
    title = (
        f"Exits on {agreement.num_positions} tokens of the model's own output"
        f" ({counted(len(agreement.outputs), 'prompt')}), mean saturation layer {agreement.mean_saturation_layer:.1f}"
    )
    return Table.of_columns(
        title,
        {
            "exit": [*(str(each.exit_layer) for each in best), f"{num_layers} (full, one pass)"],
            "agreement": [f"{agreement.agreement(exit_layer):.1%}" for exit_layer in range(1, num_layers + 1)],
            "best drafts": [*(str(each.num_draft_tokens) for each in best), "-"],
            "acceptance": [*(cell(each.acceptance_rate, "{:.1%}") for each in best), "-"],
            "tokens/round": [*(f"{each.mean_tokens_per_round:.2f}" for each in best), "-"],
            "predicted": [*(f"{each.speedup:.2f}x" for each in best), "-"],
        },
    )


def verifications_table(tuning: Tuning) -> Table:
    """Every setting that was run against autoregressive decoding, the fastest once again."""
    runs = [*tuning.verifications, *tuning.confirmations]
    turns = ["first"] * len(tuning.verifications) + ["again"] * len(tuning.confirmations)
    return Table.of_columns(
        "Run in turn with autoregressive decoding",
        {
            "exit": [str(run.prediction.exit_layer) for run in runs],
            "drafts": [str(run.prediction.num_draft_tokens) for run in runs],
            "acceptance": [cell(run.acceptance_rate, "{:.1%}") for run in runs],
            "tokens\na round": [f"{run.mean_tokens_per_round:.2f}" for run in runs],
            "predicted": [f"{run.prediction.speedup:.2f}x" for run in runs],
            "measured\n(medians)": [f"{run.speedup:.2f}x" for run in runs],
            "95 %\ninterval": [interval_in_words(run.interval) for run in runs],
            "of whole\nrepeats": [interval_in_words(run.speedup_range) for run in runs],
            "outputs\ndiffer": [f"{run.differences.num_differing} of {run.num_prompts}" for run in runs],
            "largest\nlogit gap": [cell(run.differences.largest_logit_gap, "{:.2g}") for run in runs],
            "turn": turns,
        },
    )


def tuning_as_json(tuning: Tuning) -> dict[str, Any]:
    """Everything in the tables, and the recommendation."""
    agreement = tuning.agreement
    return {
        **asdict(tuning.defaults),
        "reason": tuning.reason,
        "advice": tuning.advice,
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
        "verified": [_run(run) for run in tuning.verifications],
        "confirmed": [_run(run) | {"holds": run.holds} for run in tuning.confirmations],
    }


def _run(run: Verification) -> dict[str, Any]:
    share = 1.0 - run.differences.num_differing / run.num_prompts
    return asdict(run) | {"identical_to_autoregressive": share}
