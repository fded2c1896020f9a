"""What a caller decides about decoding."""

from __future__ import annotations

from dataclasses import dataclass, field

from app.decoding.sampling import SamplingSettings
from app.errors import check_range


@dataclass(frozen=True, kw_only=True)
class DecodingSettings:
    """Limits and choices of one decoding; what depends on the model is checked in `decode`.

    Attributes:
        max_new_tokens: Budget of new tokens, at least 0.
        eos_token_ids: Any of these ends the sequence; none by default.
        exit_layer: Blocks run before unembedding, by the strategies that leave early.
        num_draft_tokens: Most tokens drafted in a round, at least 1, by self_speculative.
        sampling: How a token is chosen.
    """

    max_new_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    exit_layer: int | None = None
    num_draft_tokens: int | None = None
    sampling: SamplingSettings = field(default_factory=SamplingSettings)

    def __post_init__(self) -> None:
        check_range("max_new_tokens", self.max_new_tokens, low=0)
        if self.num_draft_tokens is not None:
            fix = "to draft nothing use strategy autoregressive"
            check_range("num_draft_tokens", self.num_draft_tokens, low=1, fix=fix)
