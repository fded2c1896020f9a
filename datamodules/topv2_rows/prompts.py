"""TOPv2 examples to generate from: fixed prompts, and prompts with the answers they should get."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from app.errors import DataError
from app.protocols import GenerationExample
from datamodules.topv2_rows.rows import shuffled_examples
from datamodules.topv2_rows.store import Examples

_log = logging.getLogger(__name__)


def short_prompts(examples: Examples, *, count: int, length: int) -> list[list[int]]:
    """At most `count` whole prompts of at most `length` token ids, shuffled; fewer come with a warning.

    Raises:
        DataError: None is that short.
    """
    prompts = [examples.prompt(row) for row in shuffled_examples(examples) if examples.prompt_lengths[row] <= length]
    if not prompts:
        shortest = examples.prompt_lengths.min()
        raise DataError(f"no prompt of at most {length} tokens; the shortest has {shortest}: raise prompt_length")
    if len(prompts) < count:
        _log.warning("%d prompts asked for, %d have at most %d tokens", count, len(prompts), length)
    return prompts[:count]


def generation_examples(examples: Examples, *, count: int, domains: Sequence[str]) -> list[GenerationExample]:
    """At most `count` shuffled examples with their references, each grouped under its domain."""
    return [
        GenerationExample(examples.prompt(row), examples.references[row], domains[examples.sources[row]])
        for row in shuffled_examples(examples)[:count]
    ]
