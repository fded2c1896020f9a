"""The best (exit, drafts) for these prompts on this machine: predicted for all, measured for a few."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from app.decoding.settings import DecodingSettings
from app.errors import DataError, check_range
from app.evaluation.alternation import Measurement, alternate, engine_contender
from app.evaluation.layer_agreement import LayerAgreement, measure_layer_agreement
from app.evaluation.speedup_prediction import Prediction, choose_diverse, needed_agreement, predict
from app.evaluation.step_costs import StepCosts, measure_step_costs
from app.model.decoding_defaults import DecodingDefaults
from app.protocols import ExitableDecoder

_log = logging.getLogger(__name__)

_COST_REPEATS = 7
_SHARE_FOR_OUTPUTS = 0.25  # of the time limit


@dataclass(frozen=True, kw_only=True)
class TuningSettings:
    """How thoroughly to look.

    Attributes:
        max_new_tokens: Of each output, at least 2.
        max_draft_tokens: Longest draft considered, at least 1.
        num_verified: Settings to run, at least 1.
        repeats: Times each prompt is decoded by each of them, at least 1; medians count.
        time_limit_seconds: For the outputs and the verification together, at least 0. It bounds the number of prompts
            that are started, of which there is always one.
    """

    max_new_tokens: int = 128
    max_draft_tokens: int = 12
    num_verified: int = 4
    repeats: int = 3
    time_limit_seconds: float = 180.0

    def __post_init__(self) -> None:
        check_range("max_new_tokens", self.max_new_tokens, low=2)
        check_range("max_draft_tokens", self.max_draft_tokens, low=1)
        check_range("num_verified", self.num_verified, low=1)
        check_range("repeats", self.repeats, low=1)
        check_range("time_limit_seconds", self.time_limit_seconds, low=0.0)


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What a setting did when it was run.

    Attributes:
        prediction: What had been expected.
        num_prompts: Prompts run before the time was up.
        acceptance_rate: Accepted / drafted.
        mean_tokens_per_round: Tokens settled by a round.
        speedup: Over autoregressive decoding in turn with it; of each prompt the median repeat counts.
        speedup_range: Lowest and highest of a single repeat over all prompts.
        identical_share: Share of prompts with exactly the autoregressive output.
    """

    prediction: Prediction
    num_prompts: int
    acceptance_rate: float | None
    mean_tokens_per_round: float
    speedup: float
    speedup_range: tuple[float, float]
    identical_share: float


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What was found; `best` decides.

    Attributes:
        agreement: Of every exit with the outputs.
        costs: Of steps here.
        predictions: Of every exit and draft length, exits outermost.
        verifications: Of the settings that were run, in the order of their predictions.
    """

    agreement: LayerAgreement
    costs: StepCosts
    predictions: Sequence[Prediction]
    verifications: Sequence[Verification]

    @property
    def best(self) -> Verification:
        """The fastest setting that was run."""
        return max(self.verifications, key=lambda verification: verification.speedup)

    def best_of_exit(self, exit_layer: int) -> Prediction:
        """The draft length predicted to be fastest from this exit."""
        own = (prediction for prediction in self.predictions if prediction.exit_layer == exit_layer)
        return max(own, key=lambda prediction: prediction.speedup)

    @property
    def defaults(self) -> DecodingDefaults:
        """The recommendation: the best setting, or no drafts at all where even that measured below 1."""
        drafts = self.best.speedup >= 1.0
        return DecodingDefaults(
            strategy="self_speculative" if drafts else "autoregressive",
            exit_layer=self.best.prediction.exit_layer if drafts else None,
            num_draft_tokens=self.best.prediction.num_draft_tokens if drafts else None,
            measured_speedup=self.best.speedup if drafts else None,
            head=self.costs.head,
            extra_token=self.costs.extra_token,
            overhead=self.costs.overhead,
        )

    @property
    def reason(self) -> str:
        """The recommendation and why, in one sentence."""
        best, setting = self.best, self.best.prediction
        where = f"exit {setting.exit_layer} with {_drafts(setting.num_draft_tokens)}"
        measured = f"measured {best.speedup:.3f}x (predicted {setting.speedup:.3f}x) on {best.num_prompts} prompts"
        if self.defaults.strategy == "self_speculative":
            return f"self_speculative, {where}: the fastest of {len(self.verifications)} settings run, {measured}"
        slow = f"autoregressive: even {where}, the fastest of {len(self.verifications)} settings run, {measured}"
        model = self.costs.cost_model(num_layers=self.agreement.num_layers, exit_layer=setting.exit_layer)
        agreement, needed = self.agreement.agreement(setting.exit_layer), needed_agreement(model)
        if agreement >= needed:  # the costs measured apart had promised more
            return slow
        return (
            f"{slow}; it agrees with the full model on {agreement:.0%} of the tokens, and one draft a round pays from"
            f" {needed:.0%} on"
        )


def tune(
    decoder: ExitableDecoder,
    prompts: Sequence[Sequence[int]],
    *,
    eos_token_ids: Sequence[int],
    settings: TuningSettings,
) -> Tuning:
    """Find the fastest lossless way to decode these prompts greedily, one at a time.

    Args:
        decoder: In eval mode, with at least two blocks.
        prompts: At least one; token ids, each shorter than the context.
        eos_token_ids: End an output.
        settings: How thoroughly to look.

    Raises:
        ConfigError: The model has a single block.
        DataError: Every output ends with its first token, so that there is nothing to speed up.
    """
    check_range("num_layers", decoder.num_layers, low=2, fix="a single block has no exit to draft from")
    agreement = measure_layer_agreement(
        decoder,
        prompts,
        max_new_tokens=settings.max_new_tokens,
        eos_token_ids=eos_token_ids,
        time_limit_seconds=_SHARE_FOR_OUTPUTS * settings.time_limit_seconds,
        on_prompt=lambda done: _log.info("outputs of the full model: prompt %d of %d", done, len(prompts)),
    )
    if not agreement.num_positions:
        raise DataError("prompts: the model ends every output at its first token, which no draft can speed up")
    seen = prompts[: len(agreement.outputs)]
    lengths = [len(prompt) + len(output) // 2 for prompt, output in zip(seen, agreement.outputs, strict=True)]
    costs = measure_step_costs(
        decoder,
        context_length=sum(lengths) // len(lengths),
        max_positions=max(3, min(settings.max_draft_tokens + 1, decoder.max_length // 2)),
        repeats=_COST_REPEATS,
    )
    _log.info("costs of steps measured at a context of %d tokens", sum(lengths) // len(lengths))
    predictions = predict(agreement, costs, max_draft_tokens=settings.max_draft_tokens)
    chosen = choose_diverse(predictions, settings.num_verified, num_layers=decoder.num_layers)
    _log.info("verifying %s", ", ".join(f"exit {p.exit_layer} with {_drafts(p.num_draft_tokens)}" for p in chosen))
    lively = [prompt for prompt, output in zip(seen, agreement.outputs, strict=True) if len(output) > 1]
    verifications = _verify(decoder, lively, chosen, eos_token_ids=eos_token_ids, settings=settings)
    return Tuning(agreement=agreement, costs=costs, predictions=predictions, verifications=verifications)


def _verify(
    decoder: ExitableDecoder,
    prompts: Sequence[Sequence[int]],
    chosen: Sequence[Prediction],
    *,
    eos_token_ids: Sequence[int],
    settings: TuningSettings,
) -> list[Verification]:
    """Run the chosen settings and autoregressive decoding in turn, prompt by prompt."""
    plain = DecodingSettings(max_new_tokens=settings.max_new_tokens, eos_token_ids=tuple(eos_token_ids))
    contenders = [engine_contender(decoder, "autoregressive", plain)]
    for prediction in chosen:
        drafting = replace(plain, exit_layer=prediction.exit_layer, num_draft_tokens=prediction.num_draft_tokens)
        contenders.append(engine_contender(decoder, "self_speculative", drafting))
    baseline, *measured = alternate(
        contenders,
        [[prompt] for prompt in prompts],
        max_new_tokens=settings.max_new_tokens,
        repeats=settings.repeats,
        time_limit_seconds=(1.0 - _SHARE_FOR_OUTPUTS) * settings.time_limit_seconds,
        on_batch=lambda done: _log.info("verification: prompt %d of %d", done, len(prompts)),
    )
    return [
        _verification(prediction, own, baseline, repeats=settings.repeats)
        for prediction, own in zip(chosen, measured, strict=True)
    ]


def _verification(prediction: Prediction, own: Measurement, baseline: Measurement, *, repeats: int) -> Verification:
    speedup = own.speedup_over(baseline)
    single = [own.speedup_over(baseline, repeat) or 0.0 for repeat in range(repeats)]
    tokens_per_round = own.mean_tokens_per_round
    assert speedup is not None  # outputs of a single token were left out
    assert tokens_per_round is not None
    return Verification(
        prediction=prediction,
        num_prompts=len(own.results),
        acceptance_rate=own.acceptance_rate,
        mean_tokens_per_round=tokens_per_round,
        speedup=speedup,
        speedup_range=(min(single), max(single)),
        identical_share=own.identical_share(baseline),
    )


def _drafts(count: int) -> str:
    return f"{count} draft{'s' if count > 1 else ''}"
