"""What a user may choose about the continuation of prompts, in Python and on the command line."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import RepetitionPenaltyLogitsProcessor

from app.decoding.sampling import SamplingSettings
from app.decoding.settings import DecodingSettings, DraftPolicyName
from app.decoding.strategies import Strategy
from app.errors import ConfigError, check_range


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How prompts are continued.

    Args:
        chat: Put the prompt into the tokenizer's chat template, as what the user says.
        strategy: How to decode; by default what layerskip tune chose, else self_speculative.
        exit_layer: Blocks run by early_exit and by self_speculative's drafts; by default what layerskip tune chose,
            else a quarter of them.
        num_draft_tokens: Most tokens drafted in a round; by default what layerskip tune chose, else 3.
        draft_model: Smaller model with the same tokenizer that drafts for strategy draft_model.
        skipped_layers: Blocks that the drafts of layer_skip leave out, counted from 0.
        draft_policy: Draft all num_draft_tokens, or adaptively as many as pay, or none.
        fall_back: Stop drafting for the rest of a text that it turns out to slow down.
        max_new_tokens: Budget of each prompt.
        stop: One or several texts, any of which ends the output; it stays part of it, with all of its last token.
        temperature: 0 is greedy.
        top_k: Sample among the k most likely tokens only.
        top_p: Sample among the most likely tokens of this total probability only.
        min_p: Sample among tokens at least this share as likely as the most likely one only.
        repetition_penalty: Divides the scores of tokens that occurred before; 1 is off.
        seed: Of the sampling; each prompt draws numbers of its own.

    Raises:
        ConfigError: An option is out of its range, whatever the model.
    """

    chat: bool = False
    strategy: Strategy | None = None
    exit_layer: int | None = None
    num_draft_tokens: int | None = None
    draft_model: str | None = None
    skipped_layers: list[int] | None = None
    draft_policy: DraftPolicyName = "fixed"
    fall_back: bool = True
    max_new_tokens: int = 128
    stop: list[str] | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_range("seed", self.seed, low=0, high=2**63 - 1)
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise ConfigError("repetition_penalty", got=self.repetition_penalty, allowed="(0, inf)", fix="1 is off")
        self.settings()

    def settings(self) -> DecodingSettings:
        """The engine's settings, as far as they do not depend on the model."""
        penalty = self.repetition_penalty
        return DecodingSettings(
            max_new_tokens=self.max_new_tokens,
            exit_layer=self.exit_layer,
            num_draft_tokens=self.num_draft_tokens,
            skipped_layers=None if self.skipped_layers is None else tuple(self.skipped_layers),
            draft_policy=self.draft_policy,
            fall_back=self.fall_back,
            sampling=SamplingSettings(
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                min_p=self.min_p,
                processor=None if penalty == 1.0 else RepetitionPenaltyLogitsProcessor(penalty),
            ),
        )
