"""From measurements to the figures of a benchmark, and what the cost model would have said."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from app.benchmark.alternation import Contender, Measurement
from app.benchmark.benchmark import Benchmark, Costs
from app.benchmark.output_differences import OutputDifferences
from app.decoding.cost_model import CostModel, tokens_per_round
from app.decoding.result import ratio
from app.intervals import Interval
from app.protocols import ExitableDecoder

_COUNTS = ("rounds", "drafted", "accepted", "drafted_by_n_gram", "accepted_by_n_gram")  # of RoundCounts


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult(OutputDifferences):
    """One strategy with one exit and draft length; None where a figure does not apply or nothing was decoded.

    Times are decode time: the prompts' pass, and the tokens that it yields, are left out. RoundCounts explains counts.
    """

    strategy: str
    exit_layer: int | None
    num_draft_tokens: int | None
    n_gram_match: int | None
    draft_policy: str = "fixed"  # also where nothing is drafted, and in files of versions that did not note it
    draft_vocabulary_size: int | None  # token ids that drafts are chosen from; None for all of them, or for no drafts
    # Over all prompts; the median repeat of each batch counts, as it does for `speedup`.
    tokens_per_second: float | None
    seconds_per_token: float | None
    acceptance_rate: float | None
    mean_tokens_per_round: float | None
    speedup: float | None  # time per token of our own autoregressive decoding in the same run / this one's
    identical_to_autoregressive: float  # share of prompts whose tokens are, in every repeat, those of that decoding
    speedup_min: float | None  # the lowest of one whole repeat
    speedup_max: float | None  # the highest of one whole repeat
    speedup_interval: Interval | None  # 95 % interval of `speedup` over the batches (`app.benchmark.speedup_interval`)
    speedup_vs_transformers: float | None
    # Speedup over transformers' early exit of the same exit and draft length.
    speedup_vs_transformers_early_exit: float | None
    # The cost model's speedup with the measured costs and one chance of acceptance for every draft. It holds for drafts
    # of fixed length alone. Its error is predicted_speedup / speedup - 1.
    predicted_speedup: float | None
    prediction_error: float | None
    # The cost model's speedup with the measured costs and the measured rounds.
    predicted_speedup_from_rounds: float | None
    prediction_error_from_rounds: float | None
    seconds_prefill: float  # mean over the batches
    num_tokens: int  # new tokens, first ones included
    rounds: int
    drafted: int
    accepted: int
    drafted_by_n_gram: int
    accepted_by_n_gram: int
    # Those of `drafted` from each exit, where there were several to choose from.
    drafted_by_exit: dict[int, int] = field(default_factory=dict)
    accepted_by_exit: dict[int, int] = field(default_factory=dict)
    # For each position of a draft, the number of rounds that drafted that far with everything before it accepted.
    reached_by_position: list[int]
    accepted_by_position: list[int]
    acceptance_by_position: list[float | None]  # accepted_by_position / reached_by_position
    fell_back_share: float  # share of prompts for which drafting was given up


def benchmark_results(benchmark: Benchmark, decoder: ExitableDecoder) -> list[BenchmarkResult]:
    """Return the figures of each measurement of `decoder`, in the same order."""
    return [
        _result(measurement, differences, benchmark, decoder)
        for measurement, differences in zip(benchmark.measurements, benchmark.differences, strict=True)
    ]


def _result(
    measurement: Measurement, differences: OutputDifferences, benchmark: Benchmark, decoder: ExitableDecoder
) -> BenchmarkResult:
    everyone, counts, settings = benchmark.measurements, measurement.counts, measurement.contender.settings
    costs = round_costs(measurement.contender, benchmark.costs, decoder)
    has_fixed_drafts = settings.policy == "fixed" and not settings.fall_back and settings.n_gram_match is None
    predicted = _predict(measurement, costs) if has_fixed_drafts else None
    from_rounds = None if costs is None else counts.predicted_speedup(costs)
    seconds_per_token = measurement.seconds_per_token()
    speedup = measurement.speedup_over(everyone[0])
    lowest, highest = measurement.speedup_range(everyone[0])
    reached, accepted = measurement.reached_by_position, measurement.accepted_by_position
    return BenchmarkResult(
        **vars(differences),
        strategy=measurement.contender.strategy,
        exit_layer=settings.exit_layer,
        num_draft_tokens=settings.num_draft_tokens,
        n_gram_match=settings.n_gram_match,
        draft_policy=settings.policy,
        draft_vocabulary_size=_vocabulary_size(measurement.contender.strategy, decoder),
        tokens_per_second=1.0 / seconds_per_token if seconds_per_token else None,
        seconds_per_token=seconds_per_token,
        acceptance_rate=counts.acceptance_rate,
        mean_tokens_per_round=counts.mean_tokens_per_round,
        speedup=speedup,
        identical_to_autoregressive=fmean(measurement.identical_to(everyone[0])),
        speedup_min=lowest if speedup else None,
        speedup_max=highest if speedup else None,
        speedup_interval=measurement.speedup_interval(everyone[0]),
        speedup_vs_transformers=_speedup_over(everyone, "transformers", measurement),
        speedup_vs_transformers_early_exit=_speedup_over(everyone, "transformers_early_exit", measurement),
        predicted_speedup=predicted,
        prediction_error=_error(predicted, speedup),
        predicted_speedup_from_rounds=from_rounds,
        prediction_error_from_rounds=_error(from_rounds, speedup),
        seconds_prefill=measurement.seconds_prefill,
        num_tokens=sum(result.num_tokens for result in measurement.results),
        **{name: getattr(counts, name) for name in _COUNTS},
        drafted_by_exit=_sum_by_exit(result.drafted_by_exit for result in measurement.results),
        accepted_by_exit=_sum_by_exit(result.accepted_by_exit for result in measurement.results),
        reached_by_position=reached,
        accepted_by_position=accepted,
        acceptance_by_position=[ratio(*pair) for pair in zip(accepted, reached, strict=True)],
        fell_back_share=fmean(result.fell_back_after is not None for result in measurement.results),
    )


def _sum_by_exit(counts: Iterable[Mapping[int, int]]) -> dict[int, int]:
    total = Counter[int]()
    for each in counts:
        total.update(each)
    return dict(sorted(total.items()))


def _vocabulary_size(strategy: str, decoder: ExitableDecoder) -> int | None:
    """Return how many token ids the drafts of our own head are chosen from, None for all; others' do not know of it."""
    uses_it = strategy in ("self_speculative", "layer_skip") and decoder.draft_vocabulary is not None
    return len(decoder.draft_vocabulary or ()) if uses_it else None


def _speedup_over(everyone: Sequence[Measurement], strategy: str, measurement: Measurement) -> float | None:
    """Return the speedup over another strategy, at the same setting if it has any; None where it was not measured."""
    own = measurement.contender.settings
    for other in everyone:
        setting = other.contender.settings.exit_layer, other.contender.settings.num_draft_tokens
        if other.contender.strategy == strategy and setting in ((None, None), (own.exit_layer, own.num_draft_tokens)):
            return measurement.speedup_over(other)
    return None


def round_costs(contender: Contender, costs: Costs | None, decoder: ExitableDecoder) -> CostModel | None:
    """Return the cost model of a contender that drafts, with the measured costs; None where these are not known.

    Rounds whose exits change have no single one.
    """
    if costs is None or contender.settings.candidate_exits[1:]:
        return None
    settings = contender.settings
    if contender.strategy == "self_speculative" and settings.exit_layer is not None:
        return costs.model.of_exit(decoder, settings.exit_layer)
    if contender.strategy == "layer_skip" and settings.skipped_layers is not None:
        draft_step = decoder.num_layers - len(set(settings.skipped_layers)) + costs.model.draft_head
    elif contender.strategy == "n_gram":
        draft_step = 0.0
    elif costs.draft_model is not None and settings.draft_decoder is not None:
        seconds = costs.draft_model.block_seconds * (settings.draft_decoder.num_layers + costs.draft_model.head)
        draft_step = seconds / costs.model.block_seconds
    else:
        return None
    return costs.model.two_pass(num_layers=decoder.num_layers, draft_step=draft_step)


def _predict(measurement: Measurement, costs: CostModel | None) -> float | None:
    """Predict the speedup by T(a, d), with a the chance of acceptance given that the drafts before were accepted."""
    chance = ratio(measurement.counts.accepted, sum(measurement.reached_by_position))
    drafts = measurement.contender.settings.num_draft_tokens
    if costs is None or chance is None or drafts is None:
        return None
    return costs.speedup(tokens_per_round(chance, drafts), drafts)


def _error(predicted: float | None, measured: float | None) -> float | None:
    return predicted / measured - 1.0 if predicted and measured else None
