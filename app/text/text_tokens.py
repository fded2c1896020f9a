"""Where a text begins and ends in token ids, decided once by what its tokenizer does by itself."""

from __future__ import annotations

from typing import Any, NamedTuple


class Around(NamedTuple):
    """Token ids that a tokenizer puts around a text of its own accord.

    Attributes:
        before: Most often the beginning-of-sequence token, or nothing.
        after: Of a tokenizer that ends every text itself, the end-of-sequence token; else nothing.
    """

    before: list[int]
    after: list[int]


def around(tokenizer: Any) -> Around:
    """What the tokenizer puts before and after a text, read off one that it encodes with and without.

    A fast tokenizer is asked by the part of it that does so: to call it would change how it cuts and pads.

    Args:
        tokenizer: A transformers tokenizer, fast or slow.
    """
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:  # a fast one
        encoding = backend.encode("a", add_special_tokens=False)
        processor = backend.post_processor
        bare, whole = encoding.ids, encoding.ids if processor is None else processor.process(encoding).ids
    else:
        bare, whole = (_ids(tokenizer, "a", special=special) for special in (False, True))
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : (stop := start + len(bare))] == bare:
            return Around(whole[:start], whole[stop:])
    return Around([], [])


def prompt_tokens(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text to continue: it begins as the tokenizer begins texts, and does not end.

    Special tokens that are spelled out count as themselves, so a text may bring its own beginning: it is not put there
    again.

    Args:
        tokenizer: A transformers tokenizer, fast or slow.
        text: Of the prompt.
    """
    ids, before = _ids(tokenizer, text, special=False), around(tokenizer).before
    return ids if ids[: len(before)] == before else before + ids


def listed_ends(eos_token_id: int | list[int] | None) -> list[int]:
    """Every id that ends a text, of a config's `eos_token_id`: one, several or none."""
    return list(eos_token_id) if isinstance(eos_token_id, list) else [] if eos_token_id is None else [eos_token_id]


def _ids(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    return list(map(int, tokenizer(text, add_special_tokens=special)["input_ids"]))
