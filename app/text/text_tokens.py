"""Tokens at the beginning and the end of a text, as its tokenizer puts them there by itself."""

from typing import Any, NamedTuple


class Around(NamedTuple):
    """Token ids that a tokenizer puts around a text."""

    before: list[int]  # most often the beginning-of-sequence token, or nothing
    after: list[int]  # the end-of-sequence token, or nothing


def around(tokenizer: Any) -> Around:
    """The tokens that a tokenizer, fast or slow, puts before and after a text of its own accord."""
    # Calling a fast tokenizer would change how it truncates and pads, so its parts are called.
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
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
    """Token ids of a text to continue, which begins as the tokenizer begins texts, and has no end.

    Special tokens that are spelled out count as such, so a beginning that the text brings is not put there again.
    """
    ids, before = _ids(tokenizer, text, special=False), around(tokenizer).before
    return ids if ids[: len(before)] == before else before + ids


def listed_ends(eos_token_id: int | list[int] | None) -> list[int]:
    """The ids in a config's `eos_token_id`, which is one, a list or None."""
    return list(eos_token_id) if isinstance(eos_token_id, list) else [] if eos_token_id is None else [eos_token_id]


def end_token_ids(generation: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a text: those of the generation config, which may be None, else that of the tokenizer."""
    ids = None if generation is None else generation.eos_token_id
    return tuple(listed_ends(tokenizer.eos_token_id if ids is None else ids))


def _ids(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    return list(map(int, tokenizer(text, add_special_tokens=special)["input_ids"]))
