"""The expected speedup of every exit and draft length, and the few settings that are worth running.

    speedup = T(E, d) * plain_step / C(E, mean drafts per round)

The costs C are measured here. The tokens per round T(E, d) are counted from the agreement of exit E with the full
model's own outputs. The cost model's T(a, d) takes acceptances for independent, but on real text they come in runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from app.benchmark.decoding_costs import DecodingCosts
from app.decoding.cost_model import CostModel
from app.tuning.layer_agreement import LayerAgreement

_HOPELESS = 0.8  # share of the best prediction; what is predicted to be slower is not run


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The expected effect of a setting on the outputs that were looked at."""

    exit_layer: int  # blocks run by a draft
    num_draft_tokens: int  # most tokens drafted in a round
    acceptance_rate: float | None  # accepted / drafted; None where nothing could be drafted
    mean_tokens_per_round: float  # tokens settled by a round
    speedup: float  # over autoregressive decoding, by the cost model


def predict(agreement: LayerAgreement, costs: DecodingCosts, *, max_draft_tokens: int) -> list[Prediction]:
    """Predict every exit 1..L-1 with every draft length 1..max_draft_tokens, exits outermost.

    `agreement` must have at least one position.
    """
    predictions = []
    for exit_layer, drafts in product(range(1, agreement.num_layers), range(1, max_draft_tokens + 1)):
        counts = agreement.count_rounds(exit_layer, drafts)
        speedup = counts.predicted_speedup(agreement.cost_model(costs, exit_layer))
        assert speedup is not None
        assert counts.mean_tokens_per_round is not None
        predictions.append(
            Prediction(
                exit_layer=exit_layer,
                num_draft_tokens=drafts,
                acceptance_rate=counts.acceptance_rate,
                mean_tokens_per_round=counts.mean_tokens_per_round,
                speedup=speedup,
            )
        )
    return predictions


def choose_diverse(predictions: Sequence[Prediction], count: int, *, num_layers: int) -> list[Prediction]:
    """Choose the settings predicted to be fastest, without near neighbours of a faster one as long as there are others.

    Two settings are near where their exits differ by at most a twelfth of the blocks (at least one) and their drafts by
    at most two: where the prediction errs, it errs for both. What is predicted far below the best is left out.
    """
    ranked = sorted(predictions, key=lambda prediction: -prediction.speedup)
    ranked = [prediction for prediction in ranked if prediction.speedup >= _HOPELESS * ranked[0].speedup]
    reach = max(1, num_layers // 12)
    chosen: list[Prediction] = []
    for prediction in ranked:
        if not any(
            abs(prediction.exit_layer - other.exit_layer) <= reach
            and abs(prediction.num_draft_tokens - other.num_draft_tokens) <= 2
            for other in chosen
        ):
            chosen.append(prediction)
    chosen += [prediction for prediction in ranked if prediction not in chosen]
    return sorted(chosen[:count], key=lambda prediction: -prediction.speedup)


def needed_agreement(costs: CostModel) -> float:
    """Return the acceptance at which one draft a round neither gains nor loses: (1 + a) * plain_step = C(1)."""
    return costs.round_cost(1) / costs.plain_step - 1.0
