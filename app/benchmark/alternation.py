"""Ways to decode, measured in turn on the same prompts in one process: the machine's noise falls on all alike."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product, zip_longest
from statistics import fmean, median
from time import perf_counter

from app.benchmark.speedup_interval import PairedTimes, speedup_interval
from app.decoding.engine import decode_batch
from app.decoding.result import DecodingResult, RoundCounts, ratio
from app.decoding.settings import DecodingSettings
from app.decoding.strategies import Strategy
from app.intervals import Interval
from app.protocols import ExitableDecoder

Prompts = Sequence[Sequence[int]]
Decode = Callable[[Prompts, DecodingSettings], Sequence[DecodingResult]]

# The fastest of several noisy measurements was lucky as a rule (winner's curse): what was chosen for its speed is
# measured again, this often, and only the second measurement counts.
CONFIRMING_REPEATS = 5
_WARM_UP_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A way to decode: `decode` continues prompts together and greedily, by these settings."""

    strategy: str
    settings: DecodingSettings
    decode: Decode

    @property
    def label(self) -> str:
        """Strategy and setting, for instance "self_speculative, exit 2, drafts 3"."""
        own = self.settings
        settings = (("exit", own.exit_layer), ("drafts", own.num_draft_tokens), ("n-grams of", own.n_gram_match))
        return ", ".join([self.strategy, *(f"{name} {value}" for name, value in settings if value is not None)])


def engine_contender(decoder: ExitableDecoder, strategy: Strategy, settings: DecodingSettings) -> Contender:
    """Let our own engine decode."""

    def decode(prompts: Prompts, settings: DecodingSettings) -> list[DecodingResult]:
        return decode_batch(decoder, prompts, strategy=strategy, settings=settings)

    return Contender(strategy=strategy, settings=settings, decode=decode)


def drafting_contenders(
    decoder: ExitableDecoder, plain: DecodingSettings, drafting: Iterable[tuple[int, int]]
) -> list[Contender]:
    """Decode autoregressively, then self-speculatively with each (exit_layer, num_draft_tokens) of `drafting`."""
    contenders = [engine_contender(decoder, "autoregressive", plain)]
    for exit_layer, num_draft_tokens in drafting:
        settings = replace(plain, exit_layer=exit_layer, num_draft_tokens=num_draft_tokens)
        contenders.append(engine_contender(decoder, "self_speculative", settings))
    return contenders


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The results of a contender, and the figures that follow from them.

    Every figure is a ratio of sums over the prompts, so that long outputs weigh more than short ones, and None where
    there is nothing to divide by. Times leave out the prompts' pass and the first token it yields. Counts are those
    of the first repeat, because greedy decoding repeats itself.
    """

    contender: Contender
    runs: Sequence[Sequence[Sequence[DecodingResult]]]  # results by batch, repeat and prompt

    @property
    def results(self) -> list[DecodingResult]:
        return [result for repeats in self.runs for result in repeats[0]]

    @property
    def counts(self) -> RoundCounts:
        return RoundCounts.total(self.results)

    def seconds_by_batch(self, repeat: int | None = None) -> list[float]:
        """Decode time of each batch, which is that of its longest prompt: of one repeat, by default the median."""
        by_batch = ([max(result.seconds_decode for result in rows) for rows in repeats] for repeats in self.runs)
        return [median(times) if repeat is None else times[repeat] for times in by_batch]

    def seconds_per_token(self, repeat: int | None = None) -> float | None:
        """Decode time over the tokens of all prompts: of one repeat, by default of each batch's median repeat."""
        return ratio(sum(self.seconds_by_batch(repeat)), self.counts.num_decoded)

    @property
    def seconds_prefill(self) -> float:
        """The time from the start of a batch to its first tokens, as the mean over batches of their median repeats."""
        return fmean(median(max(r.seconds_prefill for r in rows) for rows in repeats) for repeats in self.runs)

    @property
    def reached_by_position(self) -> list[int]:
        return sum_columns(result.reached_by_position for result in self.results)

    @property
    def accepted_by_position(self) -> list[int]:
        return sum_columns(result.accepted_by_position for result in self.results)

    def speedup_over(self, other: "Measurement", repeat: int | None = None) -> float | None:
        """Return the other's time per token / this one's."""
        own, others = self.seconds_per_token(repeat), other.seconds_per_token(repeat)
        return others / own if own and others else None

    def speedup_range(self, other: "Measurement") -> tuple[float, float]:
        """Lowest and highest speedup over the other in one whole repeat; 0 where there is none."""
        single = [self.speedup_over(other, repeat) or 0.0 for repeat in range(len(self.runs[0]))]
        return min(single), max(single)

    def times_beside(self, other: "Measurement") -> PairedTimes:
        return PairedTimes.of(self.seconds_by_batch(), other.seconds_by_batch())

    def speedup_interval(self, other: "Measurement") -> Interval | None:
        return speedup_interval(self.speedup_over(other), self.times_beside(other))

    def identical_to(self, other: "Measurement") -> list[bool]:
        """Tell for each prompt whether its new tokens are the other's in every repeat."""
        expected = [[result.tokens for result in repeats[0]] for repeats in other.runs]
        return [
            all(rows[row].tokens == tokens for rows in repeats)
            for repeats, batch in zip(self.runs, expected, strict=True)
            for row, tokens in enumerate(batch)
        ]


def alternate(
    contenders: Sequence[Contender],
    batches: Sequence[Prompts],
    *,
    repeats: int,
    time_limit_seconds: float = float("inf"),
    fewest: int = 1,
    on_batch: Callable[[int], None] | None = None,
) -> list[Measurement]:
    """Let the contenders decode every batch in turn, beginning each time with the next of them, and repeat that.

    All batches are decoded once before any is decoded again, so that a time limit does not favour the first of them.

    Args:
        contenders: At least one; each warms up before anything counts. Budgets are at least 2.
        batches: At least one, each of at least one prompt; used in this order.
        time_limit_seconds: No batch is started after this but the first ones. A repeat that was not finished does not
            count, unless it is the only one.
        fewest: Number of batches, at least 1, that are measured in any case.
        on_batch: Called with the number of batches that are done, those of all repeats together.
    """
    started = perf_counter()
    for each in contenders:
        short = replace(each.settings, max_new_tokens=min(each.settings.max_new_tokens, _WARM_UP_TOKENS))
        each.decode(batches[0], short)
    runs: list[list[list[Sequence[DecodingResult]]]] = [[[] for _ in batches] for _ in contenders]
    for done, (repeat, batch) in enumerate(product(range(repeats), range(len(batches))), start=1):
        for turn in range(len(contenders)):
            index = (repeat + batch + turn) % len(contenders)
            contender = contenders[index]
            runs[index][batch].append(contender.decode(batches[batch], contender.settings))
        if on_batch is not None:
            on_batch(done)
        if perf_counter() - started > time_limit_seconds and done >= fewest:
            break
    whole = max(1, done // len(batches))
    kept = ([of_batch[:whole] for of_batch in own if of_batch] for own in runs)
    return [Measurement(contender=contender, runs=own) for contender, own in zip(contenders, kept, strict=True)]


def sum_columns(rows: Iterable[Sequence[int]]) -> list[int]:
    """Add up each column; shorter rows count as if they ended in zeros."""
    return [sum(column) for column in zip_longest(*rows, fillvalue=0)]
