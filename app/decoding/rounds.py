"""The contract between `decode` and a strategy: a strategy takes a Job and yields Rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from app.decoding.acceptance import ChoiceRule
from app.protocols import ExitableDecoder


class Job(NamedTuple):
    """A checked piece of work.

    Attributes:
        decoder: The model.
        prompt_tokens: At least one token id.
        exit_layer: Blocks run before unembedding, 1..num_layers.
        num_draft_tokens: Most tokens drafted in a round, at least 1 for a strategy that drafts.
        eos_token_ids: Ids that end the sequence; there is no use in drafting after one.
        budget: New tokens to yield, at least 1; prompt and budget together fit the context.
        rule: How tokens are drafted and verified.
    """

    decoder: ExitableDecoder
    prompt_tokens: Sequence[int]
    exit_layer: int
    num_draft_tokens: int
    eos_token_ids: frozenset[int]
    budget: int
    rule: ChoiceRule


class Round(NamedTuple):
    """One step of a strategy: the tokens it settled, and how many were drafted and accepted to get there."""

    tokens: list[int]
    drafted: int = 0
    accepted: int = 0
