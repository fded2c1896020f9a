"""Every strategy of the engine, and transformers' own generate, on the same prompts: who decodes how fast."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import ceil
from statistics import fmean
from typing import Literal, NamedTuple

import torch
from transformers import PreTrainedModel

from app.benchmark.alternation import Contender, Measurement, Prompts, alternate, engine_contender
from app.benchmark.decoding_costs import DecodingCosts, measure_decoding_costs, median_costs
from app.benchmark.output_differences import OutputDifferences, find_output_differences
from app.benchmark.transformers_baseline import generate_batch
from app.decoding.settings import USUAL_N_GRAM_DRAFTS, DecodingSettings, DraftPolicyName, Engine
from app.decoding.strategies import STRATEGIES, Strategy, check_settings
from app.errors import ConfigError, check_choice, check_range
from app.protocols import ExitableDecoder

_log = logging.getLogger(__name__)

BenchmarkStrategy = Literal[Strategy, "transformers", "transformers_early_exit"]
# Every strategy that can be benchmarked -> the engine's strategy that takes the same options.
BENCHMARK_STRATEGIES: dict[BenchmarkStrategy, Strategy] = {
    **{strategy: strategy for strategy in STRATEGIES},
    "transformers": "autoregressive",
    "transformers_early_exit": "self_speculative",
}
# Settings of the engine -> the user's names for them, where these differ.
_OPTIONS = {"exit_layer": "exit_layers", "draft_decoder": "draft_model"}
_MIN_POSITIONS = 3  # fewest positions of a pass to which costs can be fitted
# Costs are measured before the first batch and this many times more, because machines change their speed.
_COST_MOMENTS, _COST_REPEATS = 4, 2
_FEWEST_BATCHES = 4  # decoded whatever the time limit is: an interval over fewer says nothing


class Subject(NamedTuple):
    """The model that is benchmarked, as transformers and as the engine drive it, and one that may draft for it."""

    model: PreTrainedModel
    decoder: ExitableDecoder
    draft_decoder: ExitableDecoder | None = None


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """What to measure; `build_contenders` checks what depends on the model.

    `layerskip benchmark --help` shows these texts.

    Args:
        strategies: Ways to decode, at least one. autoregressive, which speedups refer to, is measured in any case.
        max_new_tokens: Largest number of new tokens for each prompt, at least 2.
        exit_layers: Exits for self_speculative, early_exit and transformers_early_exit.
        num_draft_tokens: Draft lengths; each is measured with each exit.
        skipped_layers: Indices, from 0, of the blocks that strategy layer_skip leaves out when it drafts.
        draft_policy: Draft num_draft_tokens each round (fixed), as many as pay (adaptive), as many as pay from that of
            the exits which is fastest so far (dynamic, whatever the engine is called), or none (off); or a list of
            these, each of which is measured.
        n_gram_match: Each strategy that drafts is measured without n-grams and with each of these: fewest latest tokens
            that must have occurred before, so that what followed them is drafted. n_gram drafts nothing else.
        n_gram_max_drafts: Largest number of tokens of such a draft.
        fall_back: Let our strategies stop drafting for a prompt that drafting slows down.
        engine: Let our strategies look at every draft before the next one (dynamic, which is not the draft policy of
            that name), or make a round one fixed sequence of kernels, a graph on a CUDA device (static).
        compile_rounds: Compile static rounds by torch's inductor.
        eos_token_ids: Ids that end a sequence; with none, every prompt is decoded to max_new_tokens.
        batch_size: Number of prompts decoded together, at least 1.
        repeats: How often each prompt is decoded in each way, at least 1; the median counts.
        time_limit_seconds: No batch of prompts is begun after this time, at least 0, but for the first four. All are
            decoded once before any is decoded again, and a repeat of some of them does not count. By default, no limit.
    """

    strategies: tuple[BenchmarkStrategy, ...]
    max_new_tokens: int = 128
    exit_layers: tuple[int, ...] = ()
    num_draft_tokens: tuple[int, ...] = ()
    skipped_layers: tuple[int, ...] = ()
    draft_policy: DraftPolicyName | tuple[DraftPolicyName, ...] = "fixed"
    n_gram_match: tuple[int, ...] = ()
    n_gram_max_drafts: int = USUAL_N_GRAM_DRAFTS
    fall_back: bool = False
    engine: Engine = "dynamic"
    compile_rounds: bool = False
    eos_token_ids: tuple[int, ...] = ()
    batch_size: int = 1
    repeats: int = 3
    time_limit_seconds: float | None = None

    def __post_init__(self) -> None:
        if not self.strategies:
            raise ConfigError("strategies", got=[], allowed=f"at least one of {' | '.join(BENCHMARK_STRATEGIES)}")
        for strategy in self.strategies:
            check_choice("strategies", strategy, BENCHMARK_STRATEGIES)
        if not self.draft_policy:
            raise ConfigError("draft_policy", got=[], allowed="at least one")
        check_range("max_new_tokens", self.max_new_tokens, low=2, fix="the first token costs no decode time")
        check_range("batch_size", self.batch_size, low=1)
        check_range("repeats", self.repeats, low=1)
        if self.time_limit_seconds is not None:
            check_range("time_limit_seconds", self.time_limit_seconds, low=0.0)
        if self.batch_size > 1 and "transformers_early_exit" in self.strategies:
            allowed = "1 with strategy transformers_early_exit"
            fix = "transformers drafts for one prompt at a time"
            raise ConfigError("batch_size", got=self.batch_size, allowed=allowed, fix=fix)
        taken = frozenset[str]().union(*map(_needs, self.strategies))
        for name in ("exit_layer", "num_draft_tokens", "skipped_layers"):
            given = getattr(self, option := _OPTIONS.get(name, name))
            if given and name not in taken:
                _log.warning("%s=%s has no effect with these strategies", option, list(given))
        if self.n_gram_match and not any(map(_takes_n_grams, self.strategies)):
            _log.warning("n_gram_match=%s has no effect with these strategies", list(self.n_gram_match))


class Costs(NamedTuple):
    """Measured costs of decoding steps of the model, and of the one that drafts for it if there is one."""

    model: DecodingCosts
    draft_model: DecodingCosts | None


class Benchmark(NamedTuple):
    """Measurements, autoregressive decoding first, how the others differ, and costs; None where nothing was drafted."""

    measurements: list[Measurement]
    costs: Costs | None
    differences: list[OutputDifferences]


def run_benchmark(
    subject: Subject, prompts: Prompts, settings: BenchmarkSettings, *, on_batch: Callable[[int], None] | None = None
) -> Benchmark:
    """Let every contender decode every prompt in turn, and measure the costs of steps on this machine meanwhile.

    The model is in eval mode. `prompts` are token ids, cut into batches in this order, and `on_batch` is called with
    the number of batches that are done, of all repeats together. ConfigError, before anything was decoded, if
    something asked for cannot be done with this model.
    """
    if not prompts:
        raise ConfigError("prompts", got=[], allowed="at least one")
    build_contenders(subject, settings)  # refuses what is wrong before anything runs
    batches = [prompts[start : start + settings.batch_size] for start in range(0, len(prompts), settings.batch_size)]
    total = len(batches) * settings.repeats
    moments = {ceil(total * moment / _COST_MOMENTS) for moment in range(1, _COST_MOMENTS + 1)}
    with torch.inference_mode():
        costs = [_measure_costs(subject, prompts, settings)]

        def after(done: int) -> None:
            if done in moments:
                costs.append(_measure_costs(subject, prompts, settings))
            if on_batch is not None:
                on_batch(done)

        measurements = alternate(
            build_contenders(subject, settings, costs[0] and costs[0].model),
            batches,
            repeats=settings.repeats,
            time_limit_seconds=float("inf") if settings.time_limit_seconds is None else settings.time_limit_seconds,
            fewest=_FEWEST_BATCHES,
            on_batch=after,
        )
        differences = find_output_differences(
            subject.decoder, batches, measurements, eos_token_ids=settings.eos_token_ids
        )
    return Benchmark(measurements, _median_costs([each for each in costs if each is not None]), differences)


def build_contenders(
    subject: Subject, settings: BenchmarkSettings, costs: DecodingCosts | None = None
) -> list[Contender]:
    """Autoregressive decoding, then each strategy asked for with all its exits and draft lengths; nothing is run.

    The drafting policies of self_speculative go by `costs`, or by parameter counts where these are None. ConfigError if
    a strategy lacks an option, or an option is out of this model's range.
    """
    strategies: list[BenchmarkStrategy] = ["autoregressive", *settings.strategies]
    contenders = []
    for strategy in dict.fromkeys(strategies):
        exits = _values(strategy, "exit_layer", settings.exit_layers)
        drafts = _values(strategy, "num_draft_tokens", settings.num_draft_tokens)
        matches = _values(strategy, "n_gram_match", settings.n_gram_match)
        if matches == [None] and _takes_n_grams(strategy):
            matches += dict.fromkeys(settings.n_gram_match)
        given = [settings.draft_policy] if isinstance(settings.draft_policy, str) else settings.draft_policy
        ours = BENCHMARK_STRATEGIES[strategy] == strategy and "num_draft_tokens" in _needs(strategy)
        policies: Sequence[DraftPolicyName] = given if ours else ["fixed"]
        whence = [each for each in product(policies, exits) if each[0] != "dynamic" or each[1] == exits[0]]
        for (policy, exit_layer), num_draft_tokens, n_gram_match in product(whence, drafts, matches):
            model = None
            if costs is not None and strategy == "self_speculative" and exit_layer is not None:
                model = costs.of_exit(subject.decoder, exit_layer)
            one = DecodingSettings(
                max_new_tokens=settings.max_new_tokens,
                eos_token_ids=settings.eos_token_ids,
                exit_layer=exit_layer,
                num_draft_tokens=num_draft_tokens,
                skipped_layers=settings.skipped_layers if "skipped_layers" in _needs(strategy) else None,
                draft_decoder=subject.draft_decoder if "draft_decoder" in _needs(strategy) else None,
                draft_policy=policy,
                draft_exits=settings.exit_layers if policy == "dynamic" and exit_layer is not None else (),
                n_gram_match=n_gram_match,
                n_gram_max_drafts=settings.n_gram_max_drafts,
                fall_back=settings.fall_back,
                engine=settings.engine if (own := BENCHMARK_STRATEGIES[strategy] == strategy) else "dynamic",
                compile_rounds=settings.compile_rounds and (own or settings.engine == "dynamic"),
                costs=model,
            )
            contenders.append(_contender(subject, strategy, one))
    return contenders


def _needs(strategy: BenchmarkStrategy) -> frozenset[str]:
    """List what a strategy needs: exit_layer, num_draft_tokens, skipped_layers, draft_decoder, n_gram_match."""
    return STRATEGIES[BENCHMARK_STRATEGIES[strategy]].needs


def _takes_n_grams(strategy: BenchmarkStrategy) -> bool:
    return BENCHMARK_STRATEGIES[strategy] == strategy and STRATEGIES[strategy].costs is not None


def _values(strategy: BenchmarkStrategy, name: str, given: Sequence[int]) -> list[int | None]:
    """List the values of a setting that a strategy is measured with; None alone where it does not take it."""
    if name not in _needs(strategy):
        return [None]
    if not given:
        raise ConfigError(_OPTIONS.get(name, name), got=[], allowed=f"at least one, with strategy {strategy}")
    return list(dict.fromkeys(given))


def _contender(subject: Subject, strategy: BenchmarkStrategy, settings: DecodingSettings) -> Contender:
    own = BENCHMARK_STRATEGIES[strategy]
    try:
        check_settings(own, settings, subject.decoder)
    except ConfigError as error:
        field = _OPTIONS.get(error.field, error.field)
        raise ConfigError(field, got=error.got, allowed=error.allowed, fix=error.fix) from error
    if strategy == own:
        return engine_contender(subject.decoder, own, settings)
    return Contender(strategy=strategy, settings=settings, decode=partial(generate_batch, subject.model))


def _measure_costs(subject: Subject, prompts: Prompts, settings: BenchmarkSettings) -> Costs | None:
    """Measure costs at the batch size of these prompts and at the context length halfway through their outputs."""
    if not any(STRATEGIES[strategy].costs for strategy in STRATEGIES if strategy in settings.strategies):
        return None

    def measure(decoder: ExitableDecoder) -> DecodingCosts | None:
        if decoder.num_layers < 2 or decoder.max_length < 2 * _MIN_POSITIONS:
            return None  # the model is too small to fit costs to
        longest = [*settings.num_draft_tokens, settings.n_gram_max_drafts if settings.n_gram_match else 0]
        positions = max(_MIN_POSITIONS, 1 + max(longest))
        return measure_decoding_costs(
            decoder,
            batch_size=min(settings.batch_size, len(prompts)),
            context_length=int(fmean(map(len, prompts))) + settings.max_new_tokens // 2,
            max_positions=min(positions, decoder.max_length // 2),
            repeats=_COST_REPEATS,
        )

    model = measure(subject.decoder)
    small = None if subject.draft_decoder is None else measure(subject.draft_decoder)
    return None if model is None else Costs(model, small)


def _median_costs(costs: Sequence[Costs]) -> Costs | None:
    if not costs:
        return None
    small = [each.draft_model for each in costs if each.draft_model is not None]
    return Costs(median_costs([each.model for each in costs]), median_costs(small) if small else None)
