"""What decoding hands back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

StopReason = Literal["eos", "max_new_tokens", "context_length"]


@dataclass(frozen=True, kw_only=True)
class DecodingResult:
    """New tokens of one prompt with their times and counts.

    Attributes:
        tokens: New tokens only; an end-of-sequence token is included, as the last.
        stop_reason: Why decoding ended.
        seconds_prefill: From the start to the first new token, which the prompt's own pass yields.
        seconds_decode: From the first new token to the last.
        rounds: Steps after the prefill; each settles at least one token.
        drafted: Tokens proposed by early exits.
        accepted: Drafted tokens that the full model kept.
    """

    tokens: list[int]
    stop_reason: StopReason
    seconds_prefill: float
    seconds_decode: float
    rounds: int
    drafted: int
    accepted: int

    @property
    def num_tokens(self) -> int:
        """Number of new tokens."""
        return len(self.tokens)

    @property
    def num_decoded(self) -> int:
        """New tokens that `seconds_decode` paid for: all but the first."""
        return max(self.num_tokens - 1, 0)

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
