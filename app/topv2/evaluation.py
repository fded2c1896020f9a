"""Semantic parses decoded at every exit and self-speculatively: what is right, and how fast (the paper's Table 6)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from app.benchmark.alternation import Measurement, alternate, engine_contender
from app.benchmark.decoding_comparison import DecodingComparison, compare_measurements
from app.decoding.settings import DecodingSettings
from app.decoding.strategies import Strategy
from app.protocols import ExitableDecoder, GenerationExample
from app.topv2.metrics import ParseExactMatch, ParseScores

Examples = Sequence[GenerationExample]


class ParseWay(NamedTuple):
    """A way to decode: autoregressive, early_exit or self_speculative."""

    strategy: Strategy
    exit_layer: int  # blocks run, by drafts where there are any; num_layers for the full model
    num_draft_tokens: int | None = None  # 0 for autoregressive decoding timed beside drafts; None where not timed


@dataclass(frozen=True, kw_only=True)
class ParsePlan:
    """What to decode, greedily: the full model, every early exit, and every exit with every draft length.

    `callbacks.ParseValidation` describes the settings. Without draft lengths speed is not measured.
    """

    num_layers: int
    exit_layers: tuple[int, ...]
    num_draft_tokens: tuple[int, ...]
    max_new_tokens: int
    eos_token_ids: tuple[int, ...]
    batch_size: int
    time_limit_seconds: float

    @property
    def exits(self) -> list[ParseWay]:
        """The full model and the early exits, whose quality is measured in batches."""
        return [
            ParseWay("autoregressive", self.num_layers),
            *(ParseWay("early_exit", layer) for layer in self.exit_layers),
        ]

    @property
    def timed(self) -> list[ParseWay]:
        """Autoregressive decoding, then what drafts, ordered by exit; nothing if there are no draft lengths."""
        drafting = [ParseWay("self_speculative", *pair) for pair in product(self.exit_layers, self.num_draft_tokens)]
        return [ParseWay("autoregressive", self.num_layers, 0), *drafting] if drafting else []

    @property
    def ways(self) -> list[ParseWay]:
        return [*self.exits, *self.timed]


@dataclass(frozen=True)
class ParseResult:
    """Scores of one way to decode, and its speed beside autoregressive decoding; None where it does not draft."""

    way: ParseWay
    scores: ParseScores
    speed: DecodingComparison | None


def evaluate_parses(
    decoder: ExitableDecoder,
    examples: Examples,
    speed_examples: Examples,
    *,
    plan: ParsePlan,
    answer: Callable[[Sequence[int]], str],
    metrics: Mapping[ParseWay, ParseExactMatch],
) -> list[DecodingComparison]:
    """Decode `examples` at every exit in batches, `speed_examples` self-speculatively one by one, and score them all.

    The decoder is in eval mode, `answer` gives the text of new token ids, and the metric of each way takes its answers.
    Returns the speed of each self-speculative way; empty where none was measured.
    """
    timed = _decode(decoder, plan.timed, speed_examples, plan, batch_size=1)
    measured = timed | _decode(decoder, plan.exits, examples, plan, batch_size=plan.batch_size)
    for way, metric in metrics.items():
        results = measured[way].results if way in measured else []
        done = (examples if way.num_draft_tokens is None else speed_examples)[: len(results)]
        answers = [answer(result.tokens) for result in results]
        metric.update(answers, [example.reference for example in done], [example.group for example in done])
    if not timed:
        return []
    baseline, *drafting = timed.values()
    return [compare_measurements(candidate, baseline, num_given=len(speed_examples)) for candidate in drafting]


def collect_results(
    metrics: Mapping[ParseWay, ParseExactMatch], speeds: Sequence[DecodingComparison]
) -> list[ParseResult]:
    """Collect the results of all ranks; a way that no example was decoded with has none.

    Computing the metrics, which hold this rank's answers, adds those of the others. `speeds` are of all ranks already.
    """
    speed_of = {(speed.exit_layer, speed.num_draft_tokens): speed for speed in speeds}
    scores = {way: metric.compute() for way, metric in metrics.items()}
    return [
        ParseResult(way, score, speed_of.get((way.exit_layer, way.num_draft_tokens or 0)))
        for way, score in scores.items()
        if score is not None
    ]


def _decode(
    decoder: ExitableDecoder, ways: Sequence[ParseWay], examples: Examples, plan: ParsePlan, *, batch_size: int
) -> dict[ParseWay, Measurement]:
    """Decode batch by batch, the ways in turn; nothing where there are no ways or no examples."""
    if not ways or not examples:
        return {}
    contenders = []
    for way in ways:
        settings = DecodingSettings(
            max_new_tokens=plan.max_new_tokens,
            eos_token_ids=plan.eos_token_ids,
            exit_layer=None if way.strategy == "autoregressive" else way.exit_layer,
            num_draft_tokens=way.num_draft_tokens or None,
        )
        contenders.append(engine_contender(decoder, way.strategy, settings))
    # A prompt that fills the context gets an empty answer, which is wrong.
    prompts = [example.prompt[: decoder.max_length] for example in examples]
    batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    measurements = alternate(contenders, batches, repeats=1, time_limit_seconds=plan.time_limit_seconds)
    return dict(zip(ways, measurements, strict=True))
