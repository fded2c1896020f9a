"""What `layerskip tune` found, as plain tables and as one object."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from app.benchmark.speedup_interval import interval_in_words
from app.tables import Table, cell
from app.tuning.result import Tuning, Verification
from app.words import counted


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
                cell(best.acceptance_rate, "{:.1%}"),
                f"{best.mean_tokens_per_round:.2f}",
                f"{best.speedup:.2f}x",
            )
        )
    full = f"{agreement.num_layers} (full, one pass)"
    rows.append((full, f"{agreement.agreement(agreement.num_layers):.1%}", "-", "-", "-", "-"))
    title = (
        f"Exits on {agreement.num_positions} tokens of the model's own output"
        f" ({counted(len(agreement.outputs), 'prompt')}), mean saturation layer {agreement.mean_saturation_layer:.1f}"
    )
    return Table(
        title,
        ("exit", "agreement", "best drafts", "acceptance", "tokens/round", "predicted"),
        rows,
    )


def verifications_table(tuning: Tuning) -> Table:
    """Every setting that was run against autoregressive decoding, the fastest once again."""
    rows: list[tuple[str, ...]] = [
        (
            str(run.prediction.exit_layer),
            str(run.prediction.num_draft_tokens),
            cell(run.acceptance_rate, "{:.1%}"),
            f"{run.mean_tokens_per_round:.2f}",
            f"{run.prediction.speedup:.2f}x",
            f"{run.speedup:.2f}x",
            interval_in_words(run.interval),
            "{:.2f}..{:.2f}x".format(*run.speedup_range),
            f"{run.differences.num_differing} of {run.num_prompts}",
            cell(run.differences.largest_logit_gap, "{:.2g}"),
            turn,
        )
        for runs, turn in ((tuning.verifications, "first"), (tuning.confirmations, "again"))
        for run in runs
    ]
    columns = (
        *("exit", "drafts", "acceptance", "tokens\na round", "predicted", "measured\n(medians)", "95 %\ninterval"),
        *("of whole\nrepeats", "outputs\ndiffer", "largest\nlogit gap", "turn"),
    )
    return Table("Run in turn with autoregressive decoding", columns, rows)


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
