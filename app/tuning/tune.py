"""The best (exit, drafts) for these prompts on this machine: predicted for all, measured for a few, then confirmed."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from app.benchmark.alternation import CONFIRMING_REPEATS, Measurement, Prompts, alternate, engine_contender
from app.benchmark.decoding_costs import DecodingCosts, measure_decoding_costs, median_costs
from app.benchmark.output_differences import OutputDifferences, find_output_differences
from app.decoding.settings import DecodingSettings
from app.errors import DataError, check_range
from app.model_files.decoding_defaults import Conditions
from app.protocols import ExitableDecoder
from app.tuning.layer_agreement import LayerAgreement, measure_layer_agreement
from app.tuning.result import Tuning, Verification, setting_in_words
from app.tuning.speedup_prediction import Prediction, choose_diverse, predict

_log = logging.getLogger(__name__)

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
        num_verified: Number of settings that are run, those with the best predictions, at least 1. One more is run
            where all of them have n-grams, or none has.
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
        check_range("num_verified", self.num_verified, low=1)
        check_range("repeats", self.repeats, low=1)
        check_range("time_limit_seconds", self.time_limit_seconds, low=0.0)


def tune(
    decoder: ExitableDecoder, prompts: Prompts, settings: TuningSettings, *, conditions: Conditions | None = None
) -> Tuning:
    """Find the fastest lossless way to decode these prompts greedily, one at a time.

    Args:
        decoder: In eval mode, with at least two blocks.
        prompts: At least one; token ids, each shorter than the context.
        conditions: Dtype, device and threads, which are noted with the result.

    Raises:
        ConfigError: The model has a single block.
        DataError: Every output ends with its first token, so that there is nothing to speed up.
    """
    agreement, costs = _look(decoder, prompts, settings)
    if not agreement.num_positions:
        raise DataError("prompts: the model ends every output at its first token, which no draft can speed up")
    predictions = predict(agreement, costs, max_draft_tokens=settings.longest_draft, n_gram_match=settings.n_gram_match)
    chosen = choose_diverse(predictions, settings.num_verified, num_layers=decoder.num_layers)
    _log.info("verifying %s", ", ".join(map(setting_in_words, chosen)))
    # The model was not yet run on the other prompts. Their outputs may end at once, but a choice needs more prompts
    # than a prediction does.
    seen, unseen = prompts[: len(agreement.outputs)], prompts[len(agreement.outputs) :]
    lively = [prompt for prompt, output in zip(seen, agreement.outputs, strict=True) if len(output) > 1] + [*unseen]
    share = replace(settings, time_limit_seconds=_FOR_VERIFICATION * settings.time_limit_seconds)
    verifications = _verify(decoder, lively, chosen, share)
    return Tuning(
        agreement=agreement,
        costs=costs,
        predictions=predictions,
        verifications=verifications,
        confirmations=_confirm(decoder, lively, verifications, settings),
        limited_by="max_draft_tokens" if settings.longest_draft == settings.max_draft_tokens else "max_new_tokens",
        conditions=conditions,
    )


def _look(decoder: ExitableDecoder, prompts: Prompts, settings: TuningSettings) -> tuple[LayerAgreement, DecodingCosts]:
    """Measure the agreement of the exits, and the costs of steps before, halfway and after."""
    costs: list[DecodingCosts] = []
    context = int(fmean(map(len, prompts))) + settings.max_new_tokens // 2
    positions = max(3, min(settings.longest_draft + 1, decoder.max_length // 2))

    def measure_costs() -> None:
        costs.append(
            measure_decoding_costs(decoder, context_length=context, max_positions=positions, repeats=_COST_REPEATS)
        )

    def after(done: int) -> None:
        _log.info("outputs of the full model: prompt %d of %d", done, len(prompts))
        if done == max(1, len(prompts) // 2):
            measure_costs()

    measure_costs()
    time_limit = _FOR_OUTPUTS * settings.time_limit_seconds
    agreement = measure_layer_agreement(
        decoder, prompts, settings.plain, time_limit_seconds=time_limit, on_prompt=after
    )
    measure_costs()
    _log.info("costs of steps: median of %d measurements at a context of %d tokens", len(costs), context)
    return agreement, median_costs(costs)


def _confirm(
    decoder: ExitableDecoder, prompts: Prompts, verifications: Sequence[Verification], settings: TuningSettings
) -> list[Verification]:
    """Run the fastest settings that reached 1 again, alone against autoregressive decoding, until one holds."""
    time_limit = _FOR_CONFIRMATION * settings.time_limit_seconds
    again = replace(settings, repeats=CONFIRMING_REPEATS, time_limit_seconds=time_limit)
    confirmations: list[Verification] = []
    for run in sorted(verifications, key=lambda run: -run.speedup)[:_MOST_CONFIRMED]:
        if run.speedup < 1.0:
            break
        _log.info("confirming %s", setting_in_words(run.prediction))
        confirmations += _verify(decoder, prompts, [run.prediction], again)
        if confirmations[-1].holds:
            break
    return confirmations


def _verify(
    decoder: ExitableDecoder, prompts: Prompts, chosen: Sequence[Prediction], settings: TuningSettings
) -> list[Verification]:
    """Run the chosen settings and autoregressive decoding in turn, prompt by prompt, as long as `settings` says."""
    plain, batches = settings.plain, [[prompt] for prompt in prompts]
    drafting = [engine_contender(decoder, each.strategy, replace(plain, **each.settings)) for each in chosen]
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
        num_tokens=counts.decoded,
        interval=own.speedup_interval(baseline),
        differences=differences,
    )
