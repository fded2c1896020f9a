"""Token ids to text: what new ones add to a prompt's, at once or as they come at a cost that does not grow."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from copy import copy
from typing import Any

_WINDOW = 8  # tokens kept: an unfinished character takes up to three, and what a cut spoils stays before the last four
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def is_byte(piece: str) -> bool:
    """Whether a vocabulary entry is one byte of SentencePiece's fallback; a run of them is text only as a whole."""
    return _BYTE.fullmatch(piece) is not None


def text_of(tokenizer: Any, tokens: Iterable[int], *, special: bool = False) -> str:
    """The text of token ids, as they spell it: some tokenizers would tidy spaces up, which code does not bear.

    Args:
        tokenizer: A transformers tokenizer (PreTrainedTokenizerBase).
        tokens: Any ids; those beyond the vocabulary have no text.
        special: Whether special tokens are written out, or left out.
    """
    text: str = tokenizer.decode(list(tokens), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
    return text


def prompt_text(tokenizer: Any, tokens: Iterable[int]) -> str:
    """The text of a document's first tokens, to be continued: without a character that they leave unfinished."""
    return text_of(tokenizer, tokens).rstrip(REPLACEMENT)


def continuation(tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text that new tokens add to a prompt's.

    Not the text of the new tokens alone: where SentencePiece begins a text it drops a space, which the first line of a
    continuation needs.
    """
    return text_of(tokenizer, [*prompt, *tokens])[len(text_of(tokenizer, prompt)) :]


class TextStream:
    """The text of tokens that arrive one by one; a character whose bytes are not all there yet waits.

    All that `push` returned, and then `rest`, make up `continuation(tokenizer, prompt, tokens)`. To know what a token
    adds it must be decoded with those before it, but a few of them suffice: a decoder treats the first token of a text
    in its own way, joins bytes to characters, and else looks at no neighbours. So the window begins with the prompt's
    last tokens, and then moves on.

    Args:
        tokenizer: A transformers tokenizer (PreTrainedTokenizerBase).
        prompt: Token ids that come before; none for a text from its beginning.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._hidden = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self._window: list[int] = []
        for token in reversed(prompt):
            piece = self._piece(token)
            if piece is not None:
                self._window.insert(0, token)
            if len(self._window) >= _WINDOW and piece is not None and not is_byte(piece):
                break
        self._shown = len(self._text())  # characters of the window's text that are the prompt's or were handed out

    def push(self, token: int) -> str:
        """The text that is settled with this token."""
        if (piece := self._piece(token)) is None:
            return ""
        self._window = [*self._window, token]
        if is_byte(piece):
            return ""
        text = self._text()
        settled = len(text) - text.endswith(REPLACEMENT)
        new, waiting = text[self._shown : settled], len(text) - max(self._shown, settled)
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

    def _piece(self, token: int) -> str | None:
        """The vocabulary's entry; None where it has no text: beyond the vocabulary, or special."""
        piece: str | None = None if token in self._hidden else self._tokenizer.convert_ids_to_tokens(token)
        return piece

    def _text(self) -> str:
        return text_of(self._tokenizer, self._window)
