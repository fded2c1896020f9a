"""What decoding hands back: while it runs a Step for every round, in the end one result for every prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

StopReason = Literal["eos", "stop", "max_new_tokens", "context_length", "interrupted"]


class Step(NamedTuple):
    """What one round settled for one sequence.

    Attributes:
        tokens: Settled tokens, at least one: accepted drafts, then one token of the full model.
        accepted: How many of `tokens`, from the first on, were drafted.
        rejected: Drafts that the full model did not keep.
    """

    tokens: list[int]
    accepted: int = 0
    rejected: tuple[int, ...] = ()

    @property
    def drafted(self) -> int:
        """Tokens drafted in this round."""
        return self.accepted + len(self.rejected)


@dataclass(frozen=True, kw_only=True)
class DecodingResult:
    """New tokens of one prompt with their times and counts.

    Attributes:
        tokens: New tokens only; what ended the sequence (an end-of-sequence token, a stop string) is included.
        stop_reason: Why decoding ended.
        seconds_prefill: From the start to the first new token, which the prompt's own pass yields.
        seconds_decode: From the first new token to the last. Prompts decoded together share their time: what a batch
            took is the longest of its results.
        steps: Rounds after the prefill, whole: the last one may have settled tokens beyond the end of the sequence.
        fell_back_after: New tokens after which drafting was given up because it did not pay; None if it was not.
    """

    tokens: list[int]
    stop_reason: StopReason
    seconds_prefill: float
    seconds_decode: float
    steps: tuple[Step, ...]
    fell_back_after: int | None = None

    @property
    def num_tokens(self) -> int:
        """Number of new tokens."""
        return len(self.tokens)

    @property
    def num_decoded(self) -> int:
        """New tokens that `seconds_decode` paid for: all but the first."""
        return max(self.num_tokens - 1, 0)

    @property
    def rounds(self) -> int:
        """Number of rounds after the prefill."""
        return len(self.steps)

    @property
    def drafted(self) -> int:
        """Tokens proposed by a draft."""
        return sum(step.drafted for step in self.steps)

    @property
    def accepted(self) -> int:
        """Drafted tokens that the full model kept."""
        return sum(step.accepted for step in self.steps)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens after the first, each second of decode time; None if there was none."""
        return self.num_decoded / self.seconds_decode if self.num_decoded else None

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / drafted; None if nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def mean_tokens_per_round(self) -> float | None:
        """Tokens after the first, each round; None if there was no round."""
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
