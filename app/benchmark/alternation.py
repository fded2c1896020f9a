"""Ways to decode, measured in turn on the same prompts in one process: the machine's noise falls on all alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product, zip_longest
from statistics import fmean, median
from time import perf_counter

from app.benchmark.speedup_interval import PairedTimes
from app.decoding.engine import decode_batch
from app.decoding.result import DecodingResult
from app.decoding.settings import DecodingSettings
from app.decoding.strategies import Strategy
from app.errors import check_range
from app.protocols import ExitableDecoder

Prompts = Sequence[Sequence[int]]
Decode = Callable[[Prompts, int], Sequence[DecodingResult]]

# The fastest of several noisy measurements was lucky as a rule (winner's curse): what was chosen for its speed is
# measured again, this often, and only that counts.
CONFIRMING_REPEATS = 5
_WARM_UP_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A way to decode.

    Attributes:
        strategy: Its name.
        exit_layer: Blocks run where it leaves early; None where it does not.
        num_draft_tokens: Most tokens drafted in a round; None where it does not draft.
        decode: Continues prompts together, each by at most that many tokens, greedily.
    """

    strategy: str
    exit_layer: int | None = None
    num_draft_tokens: int | None = None
    decode: Decode

    @property
    def label(self) -> str:
        """Its name and setting, for instance "self_speculative, exit 2, drafts 3"."""
        settings = (("exit", self.exit_layer), ("drafts", self.num_draft_tokens))
        return ", ".join([self.strategy, *(f"{name} {value}" for name, value in settings if value is not None)])


def engine_contender(decoder: ExitableDecoder, strategy: Strategy, settings: DecodingSettings) -> Contender:
    """A strategy of our own engine; of `settings` the budget is not used."""

    def decode(prompts: Prompts, max_new_tokens: int) -> list[DecodingResult]:
        return decode_batch(
            decoder, prompts, strategy=strategy, settings=replace(settings, max_new_tokens=max_new_tokens)
        )

    return Contender(
        strategy=strategy,
        exit_layer=settings.exit_layer,
        num_draft_tokens=settings.num_draft_tokens,
        decode=decode,
    )


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a contender made of the prompts.

    Every figure is a ratio of sums over the prompts, so that long outputs weigh more than short ones, and None where
    there is nothing to divide by. Times leave out the prompts' pass and the first token it yields. Counts are those
    of the first repeat: greedy decoding repeats itself.

    Attributes:
        contender: Who.
        runs: Results by batch, repeat and prompt.
    """

    contender: Contender
    runs: Sequence[Sequence[Sequence[DecodingResult]]]

    @property
    def results(self) -> list[DecodingResult]:
        """Of each prompt, in the first repeat."""
        return [result for repeats in self.runs for result in repeats[0]]

    @property
    def num_decoded(self) -> int:
        """New tokens that decode time paid for."""
        return sum(result.num_decoded for result in self.results)

    @property
    def seconds(self) -> float:
        """Decode time of all prompts: the sum of each batch's median repeat."""
        return sum(self.seconds_by_batch())

    def seconds_by_batch(self, repeat: int | None = None) -> list[float]:
        """Of one repeat, by default the median; prompts decoded together take as long as the longest of them."""
        by_batch = ([max(result.seconds_decode for result in rows) for rows in repeats] for repeats in self.runs)
        return [median(times) if repeat is None else times[repeat] for times in by_batch]

    def seconds_per_token(self, repeat: int | None = None) -> float | None:
        """Decode time over the tokens of all prompts: of one repeat, by default of each batch's median repeat."""
        return ratio(sum(self.seconds_by_batch(repeat)), self.num_decoded)

    @property
    def tokens_per_second(self) -> float | None:
        """The inverse of `seconds_per_token`."""
        seconds = self.seconds_per_token()
        return 1.0 / seconds if seconds else None

    @property
    def seconds_prefill(self) -> float:
        """From the start of a batch to its first tokens: mean over the batches of their median repeats."""
        return fmean(median(max(r.seconds_prefill for r in rows) for rows in repeats) for repeats in self.runs)

    @property
    def drafted(self) -> int:
        """Tokens proposed."""
        return sum(result.drafted for result in self.results)

    @property
    def accepted(self) -> int:
        """Proposed tokens that the full model kept."""
        return sum(result.accepted for result in self.results)

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / drafted."""
        return ratio(self.accepted, self.drafted)

    @property
    def rounds(self) -> int:
        """Steps after the prompts' pass, over all prompts."""
        return sum(result.rounds for result in self.results)

    @property
    def mean_tokens_per_round(self) -> float | None:
        """Tokens settled by a round of one sequence."""
        return ratio(self.num_decoded, self.rounds)

    @property
    def reached_by_position(self) -> list[int]:
        """For each draft position, rounds that drafted that far with everything before it accepted."""
        return _column_sums(result.reached_by_position for result in self.results)

    @property
    def accepted_by_position(self) -> list[int]:
        """For each draft position, rounds that accepted the draft there."""
        return _column_sums(result.accepted_by_position for result in self.results)

    def speedup_over(self, other: Measurement, repeat: int | None = None) -> float | None:
        """The other's time per token / this one's."""
        own, others = self.seconds_per_token(repeat), other.seconds_per_token(repeat)
        return others / own if own and others else None

    def times_beside(self, other: Measurement) -> PairedTimes:
        """The seconds of both, by batch."""
        return PairedTimes.of(self.seconds_by_batch(), other.seconds_by_batch())

    def identical_to(self, other: Measurement) -> list[bool]:
        """Of each prompt whether its new tokens are the other's in every repeat."""
        expected = [[result.tokens for result in repeats[0]] for repeats in other.runs]
        return [
            all(rows[place].tokens == tokens for rows in repeats)
            for repeats, batch in zip(self.runs, expected, strict=True)
            for place, tokens in enumerate(batch)
        ]

    def identical_share(self, other: Measurement) -> float:
        """Share of prompts whose new tokens are the other's in every repeat."""
        return fmean(self.identical_to(other))


def alternate(
    contenders: Sequence[Contender],
    batches: Sequence[Prompts],
    *,
    max_new_tokens: int,
    repeats: int,
    time_limit_seconds: float = float("inf"),
    on_batch: Callable[[int], None] | None = None,
) -> list[Measurement]:
    """Let the contenders decode every batch in turn, beginning each time with the next of them, and repeat that.

    All batches are decoded once before any is decoded again, so that a time limit does not favour the first of them.

    Args:
        contenders: At least one; each warms up before anything counts.
        batches: At least one, each of at least one prompt; used in this order.
        max_new_tokens: Of each prompt, at least 2: the first token costs no decode time.
        repeats: Times each batch is decoded by each contender, at least 1.
        time_limit_seconds: No batch is started after this; the first is always measured. A repeat that was not
            finished does not count, unless it is the only one.
        on_batch: Called with the number of batches that are done, those of all repeats together.

    Returns:
        A measurement for each contender.
    """
    check_range("max_new_tokens", max_new_tokens, low=2)
    check_range("repeats", repeats, low=1)
    started = perf_counter()
    for contender in contenders:
        contender.decode(batches[0], min(max_new_tokens, _WARM_UP_TOKENS))
    runs: list[list[list[Sequence[DecodingResult]]]] = [[[] for _ in batches] for _ in contenders]
    for done, (repeat, number) in enumerate(product(range(repeats), range(len(batches))), start=1):
        for place in range(len(contenders)):
            index = (repeat + number + place) % len(contenders)
            runs[index][number].append(contenders[index].decode(batches[number], max_new_tokens))
        if on_batch is not None:
            on_batch(done)
        if perf_counter() - started > time_limit_seconds:
            break
    whole = max(1, done // len(batches))
    kept = ([of_batch[:whole] for of_batch in own if of_batch] for own in runs)
    return [Measurement(contender=contender, runs=own) for contender, own in zip(contenders, kept, strict=True)]


def ratio(numerator: float, denominator: float) -> float | None:
    """The quotient, or None where there is nothing to divide by."""
    return numerator / denominator if denominator else None


def _column_sums(rows: Iterable[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip_longest(*rows, fillvalue=0)]
