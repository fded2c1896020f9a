"""The expected speedup of every exit and draft length, and the few settings that are worth running.

    speedup = T(E, d) * plain_step / C(E, mean drafts per round)

The costs C are measured here. The tokens per round T(E, d) are counted from the agreement of exit E with the full
model's own outputs. The cost model's T(a, d) takes acceptances for independent, but on real text they come in runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

from app.benchmark.decoding_costs import DecodingCosts
from app.decoding.cost_model import CostModel
from app.decoding.settings import USUAL_N_GRAM_DRAFTS
from app.model_files.decoding_defaults import SETTING_NAMES, DefaultStrategy, TunedPolicy
from app.tuning.found_drafts import FoundDraft
from app.tuning.layer_agreement import LayerAgreement

_LONGEST_ADAPTIVE = 8  # most tokens of a draft that ends where it no longer pays
_MOST_EXITS = 3  # that policy dynamic chooses among
_HOPELESS = 0.8  # share of the best prediction; what is predicted to be slower is not run


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The expected effect of a setting on the outputs that were looked at."""

    exit_layer: int | None  # blocks run by a draft; None where nothing but n-grams drafts
    num_draft_tokens: int | None  # most tokens drafted from the exit in a round
    n_gram_match: int | None = None  # fewest equal tokens after which n-grams draft; None where they do not
    n_gram_max_drafts: int | None = None  # most tokens that they draft in a round
    draft_vocabulary_size: int | None = None  # ids that the exit's drafts are chosen from; None where these are all
    # How many of `num_draft_tokens` are drafted, and from which exit. Unless fixed, what follows is that of the best
    # fixed length.
    draft_policy: TunedPolicy = "fixed"
    draft_exits: tuple[int, ...] = ()  # exits that policy dynamic chooses among beside `exit_layer`
    acceptance_rate: float | None  # accepted / drafted; None where nothing could be drafted
    mean_tokens_per_round: float  # tokens settled by a round
    speedup: float  # over autoregressive decoding, by the cost model

    @property
    def strategy(self) -> DefaultStrategy:
        return "n_gram" if self.exit_layer is None else "self_speculative"

    @property
    def settings(self) -> dict[str, Any]:
        """Return the engine's settings, by name."""
        return {name: getattr(self, name) for name in (*SETTING_NAMES, "draft_policy", "draft_exits")}


class NGrams(NamedTuple):
    """N-grams as drafters: the fewest equal tokens, the most drafted ones, and what they would have drafted."""

    match: int | None = None
    most: int | None = None
    found: Sequence[Sequence[FoundDraft]] = ()


def predict(
    agreement: LayerAgreement,
    costs: DecodingCosts,
    *,
    max_draft_tokens: int,
    n_gram_match: Sequence[int] = (),
    n_gram_max_drafts: Sequence[int] = (USUAL_N_GRAM_DRAFTS,),
    draft_heads: Mapping[int, float] | None = None,
) -> list[Prediction]:
    """Predict every exit 1..L-1 with every draft length 1..max_draft_tokens, exits outermost.

    After these come the same with each draft vocabulary below V that `agreement` has; and all that with n-grams of each
    of `n_gram_match`, and these alone, where any draft was found. `agreement` must have at least one position. N-grams
    alone are predicted with each of `n_gram_max_drafts`; beside an exit they draft as many as is best alone, since a
    further token costs verification the same there.

    Args:
        draft_heads: H_d of each draft vocabulary, by its size; by default that of `costs`.
    """
    exits = range(1, agreement.num_layers)
    sizes: list[int | None] = [None, *agreement.reduced]
    lengths = range(1, max_draft_tokens + 1)
    settings = [(exit_layer, drafts, size) for size in sizes for exit_layer, drafts in product(exits, lengths)]
    by_size = {size: costs_with(size, costs, draft_heads) for size in sizes}
    predictions = [_predict(agreement, by_size, *each) for each in settings]
    for match in dict.fromkeys(n_gram_match):
        by_most = {most: agreement.found_drafts(match, most=most) for most in n_gram_max_drafts}
        alone = [
            _predict(agreement, by_size, None, None, None, NGrams(match, most, found))
            for most, found in by_most.items()
            if any(draft.length for drafts in found for draft in drafts)
        ]
        if alone:
            most = max(alone, key=lambda prediction: prediction.speedup).n_gram_max_drafts
            assert most is not None
            n_grams = NGrams(match, most, by_most[most])
            predictions += [_predict(agreement, by_size, *each, n_grams) for each in settings] + alone
    return predictions


def costs_with(size: int | None, costs: DecodingCosts, draft_heads: Mapping[int, float] | None) -> DecodingCosts:
    """Return the costs of drafts that are chosen from `size` ids, given H_d of each size; None stands for all ids."""
    if size is None or draft_heads is None:
        return costs
    return replace(costs, draft_head=draft_heads[size])


def _predict(
    agreement: LayerAgreement,
    costs: Mapping[int | None, DecodingCosts],
    exit_layer: int | None,
    num_draft_tokens: int | None,
    size: int | None,
    n_grams: NGrams = NGrams(),  # noqa: B008  # immutable
) -> Prediction:
    counts = agreement.count_rounds(exit_layer, num_draft_tokens or 0, n_grams.found, size=size)
    speedup = counts.predicted_speedup(agreement.cost_model(costs[size], exit_layer))
    assert speedup is not None
    assert counts.mean_tokens_per_round is not None
    return Prediction(
        exit_layer=exit_layer,
        num_draft_tokens=num_draft_tokens,
        n_gram_match=n_grams.match,
        n_gram_max_drafts=n_grams.most,
        draft_vocabulary_size=size,
        acceptance_rate=counts.acceptance_rate,
        mean_tokens_per_round=counts.mean_tokens_per_round,
        speedup=speedup,
    )


def choose_diverse(predictions: Sequence[Prediction], count: int, *, num_layers: int) -> list[Prediction]:
    """Choose the settings predicted to be fastest, without near neighbours of a faster one as long as there are others.

    Two settings are near where their exits differ by at most a twelfth of the blocks (at least one) and their drafts by
    at most two, both with n-grams or both without: where the prediction errs, it errs for both, whatever the sizes of
    their draft vocabularies. What is predicted far
    below the best is left out. Where all of them have n-grams, or none has, the best of the others is one more. It
    shows what n-grams gain, so that one without them counts however slow it is predicted to be.
    """
    everything = sorted(predictions, key=lambda prediction: -prediction.speedup)
    ranked = [prediction for prediction in everything if prediction.speedup >= _HOPELESS * everything[0].speedup]
    reach = max(1, num_layers // 12)
    chosen: list[Prediction] = []
    for prediction in ranked:
        if not any(_near(prediction, other, reach=reach) for other in chosen):
            chosen.append(prediction)
    chosen += [prediction for prediction in ranked if prediction not in chosen]
    del chosen[count:]
    if all(prediction.n_gram_match is not None for prediction in chosen):
        chosen += [prediction for prediction in everything if prediction.n_gram_match is None][:1]
    elif all(prediction.n_gram_match is None for prediction in chosen):
        chosen += [prediction for prediction in ranked if prediction.n_gram_match is not None][:1]
    return sorted(chosen, key=lambda prediction: -prediction.speedup)


def with_policies(chosen: Sequence[Prediction], predictions: Sequence[Prediction], *, longest: int) -> list[Prediction]:
    """Add the policies `adaptive`, from the best exit, and `dynamic`, from several exits, to the settings that are run.

    Lengths that change are not predicted: as a rule the best of them is not far from the best fixed one.
    """
    fixed = max((each for each in chosen if each.exit_layer is not None), key=lambda each: each.speedup, default=None)
    if fixed is None:
        return [*chosen]
    others = other_exits(fixed, predictions)
    adaptive = replace(fixed, draft_policy="adaptive", num_draft_tokens=min(longest, _LONGEST_ADAPTIVE))
    dynamic = replace(adaptive, draft_policy="dynamic", draft_exits=others)
    return [*chosen, *([adaptive] if longest > 1 else []), *([dynamic] if others else [])]


def other_exits(chosen: Prediction, predictions: Sequence[Prediction]) -> tuple[int, ...]:
    """Return the exits, at most two, that policy `dynamic` chooses among beside that of a setting, the best first.

    These are the exits of the fastest predictions with the same n-grams and draft vocabulary. Where one of two exits
    runs less than twice as many blocks as the other, both are fast on the same texts and there is little to choose.
    Such exits are taken only where there are no others.
    """
    if chosen.exit_layer is None:
        return ()
    best: dict[int, float] = {}
    for each in predictions:
        alike = (each.n_gram_match, each.draft_vocabulary_size) == (chosen.n_gram_match, chosen.draft_vocabulary_size)
        if alike and each.exit_layer is not None and each.speedup >= _HOPELESS * chosen.speedup:
            best[each.exit_layer] = max(each.speedup, best.get(each.exit_layer, 0.0))
    ranked = [exit_layer for exit_layer in sorted(best, key=lambda one: -best[one]) if exit_layer != chosen.exit_layer]
    spread = [chosen.exit_layer]
    for one in ranked:
        if all(max(one, other) >= 2 * min(one, other) for other in spread):
            spread.append(one)
    return tuple((spread[1:] or ranked)[: _MOST_EXITS - 1])


def _near(one: Prediction, other: Prediction, *, reach: int) -> bool:
    if (one.n_gram_match is None) != (other.n_gram_match is None):
        return False
    if one.exit_layer is None or other.exit_layer is None:
        return one.exit_layer == other.exit_layer
    assert one.num_draft_tokens is not None
    assert other.num_draft_tokens is not None
    close = abs(one.exit_layer - other.exit_layer) <= reach
    return close and abs(one.num_draft_tokens - other.num_draft_tokens) <= 2


def needed_agreement(costs: CostModel) -> float:
    """Return the acceptance at which one draft a round neither gains nor loses: (1 + a) * plain_step = C(1)."""
    return costs.round_cost(1) / costs.plain_step - 1.0
