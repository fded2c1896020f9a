"""What decoding hands back: a Step for every round while it runs, and one result for every prompt at the end."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

from app.decoding.cost_model import CostModel

StopReason = Literal["eos", "stop", "max_new_tokens", "context_length", "interrupted"]


class Step(NamedTuple):
    """What one round settled for one sequence."""

    tokens: list[int]  # the accepted drafts, then one token of the full model
    accepted: int = 0  # how many of `tokens`, counted from the first, were drafted
    rejected: tuple[int, ...] = ()  # drafts that the full model did not keep
    by_n_gram: bool = False  # whether the drafts are what followed the latest tokens where they occurred before
    exits: tuple[int, ...] = ()  # the exit that drafted each token, where there were several to choose from

    @property
    def drafted(self) -> int:
        return self.accepted + len(self.rejected)


def ratio(numerator: float, denominator: float) -> float | None:
    """Divide, or return None where there is nothing to divide by."""
    return numerator / denominator if denominator else None


@dataclass(frozen=True, kw_only=True)
class DecodingResult:
    """New tokens of one prompt with their times and counts. A rate is None where there is nothing to divide by.

    Attributes:
        tokens: The new tokens, including what ended the sequence (an end-of-sequence token or a stop string).
        seconds_prefill: Time until the first new token, which the pass over the prompt yields.
        seconds_decode: Time from the first new token to the last. Prompts decoded together share their time, so the
            longest of their results is what the batch took.
        steps: The rounds after the prefill. The last round may have settled tokens beyond the end of the sequence.
        fell_back_after: New tokens after which drafting was given up because it did not pay; None if it went on.
    """

    tokens: list[int]
    stop_reason: StopReason
    seconds_prefill: float
    seconds_decode: float
    steps: tuple[Step, ...]
    fell_back_after: int | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_decoded(self) -> int:
        """New tokens that `seconds_decode` paid for: all but the first."""
        return max(self.num_tokens - 1, 0)

    @property
    def rounds(self) -> int:
        return len(self.steps)

    @property
    def drafted(self) -> int:
        return sum(step.drafted for step in self.steps)

    @property
    def accepted(self) -> int:
        return sum(step.accepted for step in self.steps)

    @property
    def rounds_by_n_gram(self) -> int:
        return sum(step.by_n_gram for step in self.steps)

    @property
    def drafted_by_n_gram(self) -> int:
        """Those of `drafted` that n-grams drafted; the strategy's drafter drafted the others."""
        return sum(step.drafted for step in self.steps if step.by_n_gram)

    @property
    def accepted_by_n_gram(self) -> int:
        return sum(step.accepted for step in self.steps if step.by_n_gram)

    @property
    def drafted_by_exit(self) -> dict[int, int]:
        """Those of `drafted` that each exit drafted, where there were several to choose from."""
        return dict(sorted(Counter(exit_layer for step in self.steps for exit_layer in step.exits).items()))

    @property
    def accepted_by_exit(self) -> dict[int, int]:
        """Those of `drafted_by_exit` that the full model kept."""
        kept = Counter(exit_layer for step in self.steps for exit_layer in step.exits[: step.accepted])
        return {exit_layer: kept[exit_layer] for exit_layer in self.drafted_by_exit}

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed, in which the prefill and its token do not count."""
        return self.num_decoded / self.seconds_decode if self.num_decoded else None

    @property
    def acceptance_rate(self) -> float | None:
        return ratio(self.accepted, self.drafted)

    @property
    def mean_tokens_per_round(self) -> float | None:
        return ratio(self.num_decoded, self.rounds)

    @property
    def reached_by_position(self) -> list[int]:
        """For each draft position of a round, how many rounds drafted that far and accepted everything before it."""
        longest = max((step.drafted for step in self.steps), default=0)
        return [sum(step.drafted > i and step.accepted >= i for step in self.steps) for i in range(longest)]

    @property
    def accepted_by_position(self) -> list[int]:
        """For each draft position of a round, how many rounds accepted the draft there."""
        longest = max((step.drafted for step in self.steps), default=0)
        return [sum(step.accepted > i for step in self.steps) for i in range(longest)]


@dataclass(frozen=True, kw_only=True)
class RoundCounts:
    """Sums over prompts, so that those of disjoint parts add up; a ratio is None where its denominator is 0.

    A round is a step after the prompt's own pass. That pass yields the first token of an output, which is not counted.
    """

    num_decoded: int  # new tokens after the first of each output
    rounds: int
    drafted: int  # tokens proposed in the rounds
    accepted: int  # proposed tokens that the full model kept
    rounds_by_n_gram: int = 0  # those of the rounds whose tokens were found in the text, and so on
    drafted_by_n_gram: int = 0
    accepted_by_n_gram: int = 0

    @staticmethod
    def total(parts: Sequence["RoundCounts | DecodingResult"]) -> "RoundCounts":
        names = [field.name for field in fields(RoundCounts)]
        return RoundCounts(**{name: sum(getattr(part, name) for part in parts) for name in names})

    @property
    def acceptance_rate(self) -> float | None:
        return ratio(self.accepted, self.drafted)

    @property
    def mean_tokens_per_round(self) -> float | None:
        return ratio(self.num_decoded, self.rounds)

    def predicted_speedup(self, costs: CostModel) -> float | None:
        """Predict the speedup over autoregressive decoding if these rounds cost what `costs` says."""
        if not self.rounds:
            return None
        found, others = self.rounds_by_n_gram, self.rounds - self.rounds_by_n_gram
        cost = others * costs.plain_step
        if drafted := self.drafted - self.drafted_by_n_gram:
            cost = others * costs.round_cost(drafted / others)
        if found:
            cost += found * costs.of_n_grams().round_cost(self.drafted_by_n_gram / found)
        return self.num_decoded * costs.plain_step / cost
