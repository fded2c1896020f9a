"""Ends of a sequence that show in its text only."""

from collections.abc import Sequence
from typing import Any

from app.errors import ConfigError
from app.text.text_stream import REPLACEMENT, is_byte, text_of


class StopStrings:
    """A StopCondition that ends a sequence with the first token at which its new text contains one of some strings.

    Special tokens count as the text they are written as, so that a string can name one. Only as many of the latest
    tokens are decoded as can hold the longest string, and one before them, at which decoding may drop a space. Where
    that one belongs to the prompt, its text is cut off.

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
        self._num_tokens = max(len(string.encode()) for string in strings) + 1  # every token adds at least a byte

    def __call__(self, prompt: Sequence[int], tokens: Sequence[int], num_new: int) -> int | None:
        for stop in range(len(tokens) - num_new + 1, len(tokens) + 1):
            start, is_enough = self._start(tokens, stop, self._num_tokens)
            before = () if is_enough else prompt[self._start(prompt, len(prompt), 1)[0] :]
            text = text_of(self._tokenizer, [*before, *tokens[start:stop]], special=True)
            if before:
                text = text[len(text_of(self._tokenizer, before, special=True)) :]
            if any(string in text for string in self._strings):
                return stop
        return None

    def _start(self, tokens: Sequence[int], stop: int, needed: int) -> tuple[int, bool]:
        """Where the last `needed` tokens before `stop` that have a text begin, and whether there are so many.

        It is never within a run of fallback bytes, which is text only as a whole.
        """
        start, unsafe = stop, True
        while start and (needed or unsafe):
            start -= 1
            piece = self._tokenizer.convert_ids_to_tokens(tokens[start])
            needed -= bool(needed and piece)  # ids beyond the tokenizer's vocabulary add nothing
            unsafe = piece is None or is_byte(piece)
        return start, not needed and not unsafe
