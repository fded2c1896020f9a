"""Ends of a sequence that show in its text only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.decoding.text_stream import REPLACEMENT, is_byte
from app.errors import ConfigError


class StopStrings:
    """A StopCondition: ends a sequence with the first token at which its text contains one of some strings.

    Special tokens count as the text they are written as, so that a string can name one. Only as many of the latest
    tokens are decoded as can hold the longest string.

    Args:
        tokenizer: A transformers tokenizer (PreTrainedTokenizerBase).
        strings: At least one, each of at least one character; spaces and line breaks count.

    Raises:
        ConfigError: A string is empty or cannot occur in a text.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        if not strings:
            raise ConfigError("stop", got=[], allowed="at least one string")
        for string in strings:
            if not string or REPLACEMENT in string or string != string.encode("utf-8", "ignore").decode():
                raise ConfigError("stop", got=string, allowed="valid text of at least one character")
        self._tokenizer, self._strings = tokenizer, tuple(strings)
        # Every token adds at least a byte. One token more, as decoding may drop a space where it begins.
        self._num_tokens = max(len(string.encode()) for string in strings) + 1

    def __call__(self, tokens: Sequence[int], num_new: int) -> int | None:
        """How many of `tokens` to keep if one of the last `num_new` completes a string, else None."""
        for stop in range(len(tokens) - num_new + 1, len(tokens) + 1):
            text = self._tokenizer.decode(list(tokens[self._start(tokens, stop) : stop]))
            if any(string in text for string in self._strings):
                return stop
        return None

    def _start(self, tokens: Sequence[int], stop: int) -> int:
        """Where to begin decoding: not within a run of fallback bytes, which is text only as a whole."""
        start, needed, unsafe = stop, self._num_tokens, True
        while start and (needed or unsafe):
            start -= 1
            piece = self._tokenizer.convert_ids_to_tokens(tokens[start])
            needed -= bool(needed and piece)  # ids beyond the tokenizer's vocabulary add nothing
            unsafe = piece is None or is_byte(piece)
        return start
