"""What decoding hands back: a Step for every round while it runs, and one result for every prompt at the end."""

from collections import Counter
from dataclasses import dataclass
from typing import Literal, NamedTuple

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
        return self.accepted / self.drafted if self.drafted else None

    @property
    def mean_tokens_per_round(self) -> float | None:
        return self.num_decoded / self.rounds if self.rounds else None

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
