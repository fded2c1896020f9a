"""Predictions, runs and tunings with made-up figures."""

from collections.abc import Sequence
from typing import Any

from app.benchmark.decoding_costs import DecodingCosts
from app.benchmark.output_differences import OutputDifferences
from app.tuning.layer_agreement import LayerAgreement
from app.tuning.result import Tuning, Verification
from app.tuning.speedup_prediction import Prediction

COSTS = DecodingCosts(block_seconds=1e-3, head=2.0, draft_head=1.5, first_extra=0.25, extra_token=0.05, overhead=0.5)


def make_prediction(exit_layer: int, drafts: int, speedup: float) -> Prediction:
    return Prediction(
        exit_layer=exit_layer,
        num_draft_tokens=drafts,
        acceptance_rate=0.5,
        mean_tokens_per_round=1.5,
        speedup=speedup,
    )


def make_run(prediction: Prediction, speedup: float, low: float | None = None, **given: Any) -> Verification:
    """Measured so, the slowest repeat `low`, and by its interval above 1 if it is."""
    return Verification(
        prediction=prediction,
        acceptance_rate=0.5,
        mean_tokens_per_round=1.5,
        speedup=speedup,
        speedup_range=(speedup if low is None else low, speedup),
        differences=OutputDifferences(num_prompts=4, num_differing=0),
        **({"num_prompts": 4, "num_given": 4, "num_tokens": 200, "interval": (speedup - 1e-4, speedup + 1e-4)} | given),
    )


def make_tuning(*measured: float, again: Sequence[tuple[int, float, float]] = ()) -> Tuning:
    """Of exit 1 with 1, 2, ... drafts, all predicted to reach 3x, measured as given.

    `again` tells of the runs after the choice: drafts, speedup, the slowest repeat's.
    """
    runs = [make_run(make_prediction(1, drafts, 3.0), speedup) for drafts, speedup in enumerate(measured, start=1)]
    agreement = LayerAgreement(
        num_layers=2, prompts=[[4]], outputs=[[5, 6, 7]], budgets=[3], matches={1: [[True, False]], 2: [[True, True]]}
    )
    return Tuning(
        agreement=agreement,
        costs=COSTS,
        predictions=[run.prediction for run in runs],
        verifications=runs,
        confirmations=[make_run(runs[drafts - 1].prediction, speedup, low) for drafts, speedup, low in again],
    )
