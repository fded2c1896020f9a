"""Token ids to text as they come, at a cost that does not grow with the text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from copy import copy
from typing import Any

_WINDOW = 8  # tokens kept: an unfinished character takes up to three, and what a cut spoils stays before the last four
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def is_byte(piece: str) -> bool:
    """Whether a vocabulary entry is one byte of SentencePiece's fallback; a run of them is text only as a whole."""
    return _BYTE.fullmatch(piece) is not None


class TextStream:
    """The text of tokens that arrive one by one; a character whose bytes are not all there yet waits.

    All that `push` returned, and then `rest`, make up `tokenizer.decode(tokens, skip_special_tokens=True)`. To know
    what a token adds it must be decoded with those before it, but a few of them suffice.

    Args:
        tokenizer: A transformers tokenizer (PreTrainedTokenizerBase).
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._hidden = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self._window: list[int] = []
        self._shown = 0  # characters of the window's text that were handed out

    def push(self, token: int) -> str:
        """The text that is settled with this token."""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None or token in self._hidden:  # no text: beyond the tokenizer's vocabulary, or special
            return ""
        self._window = [*self._window, token]
        if is_byte(piece):
            return ""
        text = self._text()
        settled = len(text) - text.endswith(REPLACEMENT)
        new, waiting = text[self._shown : settled], len(text) - settled
        self._window = self._window[-_WINDOW:]
        self._shown = len(self._text()) - waiting
        return new

    def rest(self) -> str:
        """The text that still waits, as it stands."""
        return self._text()[self._shown :]

    def preview(self, tokens: Iterable[int]) -> str:
        """The text that these tokens would add if nothing came after them."""
        ahead = copy(self)
        return "".join([ahead.push(token) for token in tokens]) + ahead.rest()

    def _text(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=True)  # type: ignore[no-any-return]
