"""The best (exit, drafts) for these prompts on this machine: predicted for all, measured for a few, then confirmed."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple

from app.benchmark.alternation import (
    CONFIRMING_REPEATS,
    Contender,
    Measurement,
    Prompts,
    alternate,
    engine_contender,
)
from app.benchmark.decoding_costs import DecodingCosts, fitted_line, measure_decoding_costs, median_costs
from app.benchmark.output_differences import OutputDifferences, find_output_differences
from app.decoding.result import DecodingResult
from app.decoding.settings import DecodingSettings
from app.errors import DataError, check_range
from app.model_files.decoding_defaults import Conditions
from app.protocols import ExitableDecoder
from app.tuning.layer_agreement import LayerAgreement, measure_layer_agreement
from app.tuning.result import Tuning, Verification, setting_in_words
from app.tuning.speedup_prediction import Prediction, choose_diverse, costs_with, predict, with_policies

_log = logging.getLogger(__name__)

Vocabularies = Mapping[int, Sequence[int]]  # number of ids, below V -> the first so many of a draft vocabulary

_COST_REPEATS = 3  # each of the three times that costs are measured
_MOST_CONFIRMED = 2
# Shares of the time limit, which add up to 1.
_FOR_OUTPUTS, _FOR_VERIFICATION, _FOR_CONFIRMATION = 0.2, 0.4, 0.4 / _MOST_CONFIRMED


@dataclass(frozen=True, kw_only=True)
class TuningSettings:
    """How thoroughly to look for the fastest setting; `layerskip tune --help` shows these texts.

    Args:
        max_new_tokens: Largest number of new tokens for each prompt, at least 2.
        max_draft_tokens: Longest draft that is considered, at least 1.
        n_gram_match: Each setting is also considered with n-grams, and they alone: with each of these numbers of latest
            tokens, at least 1, that must have occurred before. [] leaves n-grams out.
        n_gram_max_drafts: Most tokens that n-grams draft in a round: one of these numbers, each at least 1.
        num_verified: Number of settings that are run, those with the best predictions, at least 1. One more is run
            where all of them have n-grams, or none has, and two more whose drafts end where they no longer pay: from
            the best exit (draft_policy adaptive), and from the best two or three (dynamic).
        repeats: How often each of them decodes each prompt, at least 1; the median counts. The fastest is then run five
            more times. It is only stored if it beats autoregressive decoding in each of these, and by the 95 % interval
            over at least 4 prompts and 200 tokens.
        time_limit_seconds: No prompt is started after this time, at least 0, but one is always decoded. All prompts are
            decoded once before any is decoded again. Nothing is stored if the prompts that were decoded are too few.
        eos_token_ids: Ids that end a sequence.
    """

    max_new_tokens: int = 128
    max_draft_tokens: int = 12
    n_gram_match: tuple[int, ...] = (2, 4)
    n_gram_max_drafts: tuple[int, ...] = (4, 8, 16)
    num_verified: int = 4
    repeats: int = 3
    time_limit_seconds: float = 180.0
    eos_token_ids: tuple[int, ...] = ()

    @property
    def plain(self) -> DecodingSettings:
        """The settings of autoregressive decoding."""
        return DecodingSettings(max_new_tokens=self.max_new_tokens, eos_token_ids=self.eos_token_ids)

    @property
    def longest_draft(self) -> int:
        """The longest draft that an output has room for.

        Its first token comes from the prompt's pass, and its last from verification.
        """
        return max(1, min(self.max_draft_tokens, self.max_new_tokens - 2))

    def __post_init__(self) -> None:
        check_range("max_new_tokens", self.max_new_tokens, low=2)
        check_range("max_draft_tokens", self.max_draft_tokens, low=1)
        for match in self.n_gram_match:
            check_range("n_gram_match", match, low=1, fix="[] leaves n-grams out")
        check_range("n_gram_max_drafts", min(self.n_gram_max_drafts, default=0), low=1)
        check_range("num_verified", self.num_verified, low=1)
        check_range("repeats", self.repeats, low=1)
        check_range("time_limit_seconds", self.time_limit_seconds, low=0.0)


class _Means(NamedTuple):
    """What is known of the model once settings are run. Policies end drafts by it where these no longer pay."""

    agreement: LayerAgreement
    costs: DecodingCosts  # of drafts that are chosen from all ids
    draft_heads: Mapping[int, float]  # V' below V -> H_d of such a draft vocabulary
    vocabularies: Vocabularies


def tune(
    decoder: ExitableDecoder, prompts: Prompts, settings: TuningSettings, *, conditions: Conditions | None = None
) -> Tuning:
    """Find the fastest lossless way to decode these prompts greedily, one at a time.

    Args:
        decoder: In eval mode, with at least two blocks. Drafts are considered from all ids, from its draft vocabulary
            if it has one, and from the first half and quarter of that; its first ids are those that end a text.
        prompts: At least one; token ids, each shorter than the context.
        conditions: Dtype, device and threads, which are noted with the result.

    Raises:
        ConfigError: The model has a single block.
        DataError: Every output ends with its first token, so that there is nothing to speed up.
    """
    vocabulary = decoder.draft_vocabulary
    try:
        return _tune(decoder, prompts, settings, conditions)
    finally:
        decoder.use_draft_vocabulary(vocabulary)


def _tune(
    decoder: ExitableDecoder, prompts: Prompts, settings: TuningSettings, conditions: Conditions | None
) -> Tuning:
    vocabularies = _vocabularies(decoder, num_ends=len(settings.eos_token_ids))
    agreement, costs, draft_heads = _look(decoder, prompts, settings, vocabularies)
    if not agreement.num_positions:
        raise DataError("prompts: the model ends every output at its first token, which no draft can speed up")
    predictions = predict(
        agreement,
        costs,
        max_draft_tokens=settings.longest_draft,
        n_gram_match=settings.n_gram_match,
        n_gram_max_drafts=settings.n_gram_max_drafts,
        draft_heads=draft_heads,
    )
    chosen = choose_diverse(predictions, settings.num_verified, num_layers=decoder.num_layers)
    chosen = with_policies(chosen, predictions, longest=settings.longest_draft)
    means = _Means(agreement, costs, draft_heads, vocabularies)
    _log.info("verifying %s", ", ".join(map(setting_in_words, chosen)))
    # The model was not yet run on the other prompts. Their outputs may end at once, but a choice needs more prompts
    # than a prediction does.
    seen, unseen = prompts[: len(agreement.outputs)], prompts[len(agreement.outputs) :]
    lively = [prompt for prompt, output in zip(seen, agreement.outputs, strict=True) if len(output) > 1] + [*unseen]
    share = replace(settings, time_limit_seconds=_FOR_VERIFICATION * settings.time_limit_seconds)
    verifications = _verify(decoder, lively, chosen, share, means)
    return Tuning(
        agreement=agreement,
        costs=costs,
        predictions=predictions,
        verifications=verifications,
        confirmations=_confirm(decoder, lively, verifications, settings, means),
        limited_by="max_draft_tokens" if settings.longest_draft == settings.max_draft_tokens else "max_new_tokens",
        conditions=conditions,
        draft_heads=draft_heads,
    )


def _vocabularies(decoder: ExitableDecoder, *, num_ends: int) -> Vocabularies:
    """Return the draft vocabulary and its first half and quarter, as far as they are below V and hold all ends."""
    ids = decoder.draft_vocabulary or ()
    sizes = [len(ids) // part for part in (1, 2, 4)]
    return {size: ids[:size] for size in sizes if max(1, num_ends) <= size < decoder.vocab_size}


def _look(
    decoder: ExitableDecoder, prompts: Prompts, settings: TuningSettings, vocabularies: Vocabularies
) -> tuple[LayerAgreement, DecodingCosts, dict[int, float]]:
    """Measure the agreement of the exits, and the costs of steps before, halfway and after; and H_d by vocabulary.

    H_d is measured with all V ids and with the largest vocabulary, and lies on a line for the others: the product with
    the head and the choice among its logits take time in proportion to V', and norm, embedding and waiting the same
    time whatever V' is. Parameter counts would leave the latter out.
    """
    measured_with = [decoder.vocab_size, *list(vocabularies)[:1]]
    costs: dict[int, list[DecodingCosts]] = {size: [] for size in measured_with}
    context = int(fmean(map(len, prompts))) + settings.max_new_tokens // 2
    positions = max(3, min(settings.longest_draft + 1, decoder.max_length // 2))

    def measure_costs() -> None:
        for size, measured in costs.items():
            decoder.use_draft_vocabulary(vocabularies.get(size))
            measured.append(
                measure_decoding_costs(decoder, context_length=context, max_positions=positions, repeats=_COST_REPEATS)
            )

    def after(done: int) -> None:
        _log.info("outputs of the full model: prompt %d of %d", done, len(prompts))
        if done == max(1, len(prompts) // 2):
            measure_costs()

    measure_costs()
    time_limit = _FOR_OUTPUTS * settings.time_limit_seconds
    agreement = measure_layer_agreement(
        decoder,
        prompts,
        settings.plain,
        vocabularies=list(vocabularies.values()),
        time_limit_seconds=time_limit,
        on_prompt=after,
    )
    measure_costs()
    every = [each for measured in costs.values() for each in measured]
    _log.info("costs of steps: median of %d measurements at a context of %d tokens", len(every), context)
    median_of_all = median_costs(every)
    if not vocabularies:
        return agreement, median_of_all, {}
    start, slope = fitted_line({size: median_costs(measured).draft_head for size, measured in costs.items()})
    draft_heads = {size: start + slope * size for size in [*vocabularies, decoder.vocab_size]}
    return agreement, replace(median_of_all, draft_head=draft_heads.pop(decoder.vocab_size)), draft_heads


def _confirm(
    decoder: ExitableDecoder,
    prompts: Prompts,
    verifications: Sequence[Verification],
    settings: TuningSettings,
    means: _Means,
) -> list[Verification]:
    """Run the fastest settings that reached 1 again, alone against autoregressive decoding, until one holds."""
    time_limit = _FOR_CONFIRMATION * settings.time_limit_seconds
    again = replace(settings, repeats=CONFIRMING_REPEATS, time_limit_seconds=time_limit)
    confirmations: list[Verification] = []
    for run in sorted(verifications, key=lambda run: -run.speedup)[:_MOST_CONFIRMED]:
        if run.speedup < 1.0:
            break
        _log.info("confirming %s", setting_in_words(run.prediction))
        confirmations += _verify(decoder, prompts, [run.prediction], again, means)
        if confirmations[-1].holds:
            break
    return confirmations


def _verify(
    decoder: ExitableDecoder,
    prompts: Prompts,
    chosen: Sequence[Prediction],
    settings: TuningSettings,
    means: _Means,
) -> list[Verification]:
    """Run the chosen settings and autoregressive decoding in turn, prompt by prompt, as long as `settings` says."""
    plain, batches = settings.plain, [[prompt] for prompt in prompts]
    drafting = [_contender(decoder, each, plain, means) for each in chosen]
    measured = alternate(
        [engine_contender(decoder, "autoregressive", plain), *drafting],
        batches,
        repeats=settings.repeats,
        time_limit_seconds=settings.time_limit_seconds,
        on_batch=lambda done: _log.info("verification: run %d of %d", done, len(prompts) * settings.repeats),
    )
    differences = find_output_differences(decoder, batches, measured, eos_token_ids=settings.eos_token_ids)
    return [
        _verification(*each, measured[0], num_given=len(prompts))
        for each in zip(chosen, measured[1:], differences[1:], strict=True)
    ]


def _contender(decoder: ExitableDecoder, prediction: Prediction, plain: DecodingSettings, means: _Means) -> Contender:
    """Let the engine decode as predicted; every call first gives the decoder the draft vocabulary of the prediction."""
    size = prediction.draft_vocabulary_size
    costs = means.agreement.cost_model(costs_with(size, means.costs, means.draft_heads), prediction.exit_layer)
    settings = replace(plain, **prediction.settings, costs=costs)
    contender = engine_contender(decoder, prediction.strategy, settings)

    def decode(prompts: Prompts, settings: DecodingSettings) -> Sequence[DecodingResult]:
        decoder.use_draft_vocabulary(None if size is None else means.vocabularies[size])
        return contender.decode(prompts, settings)

    return replace(contender, decode=decode)


def _verification(
    prediction: Prediction, own: Measurement, differences: OutputDifferences, baseline: Measurement, *, num_given: int
) -> Verification:
    counts, speedup = own.counts, own.speedup_over(baseline)
    assert speedup is not None  # outputs of a single token were left out
    assert counts.mean_tokens_per_round is not None
    return Verification(
        prediction=prediction,
        num_prompts=differences.num_prompts,
        num_given=num_given,
        acceptance_rate=counts.acceptance_rate,
        mean_tokens_per_round=counts.mean_tokens_per_round,
        speedup=speedup,
        speedup_range=own.speedup_range(baseline),
        num_tokens=counts.num_decoded,
        interval=own.speedup_interval(baseline),
        differences=differences,
    )
