"""Turns token ids into the text that they add to a prompt's, at once or token by token at a constant cost."""

import re
from collections.abc import Iterable, Sequence
from copy import copy
from typing import Any

_WINDOW = 8  # tokens kept: an unfinished character takes up to three, and a cut spoils none of the last four
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def is_byte(piece: str) -> bool:
    """Whether a vocabulary entry is a byte of SentencePiece's fallback, which only a whole run of them makes text."""
    return _BYTE.fullmatch(piece) is not None


def text_of(tokenizer: Any, tokens: Iterable[int], *, special: bool = False) -> str:
    """The text of token ids, with special tokens only if `special` is True.

    Ids beyond the vocabulary have no text. Spaces stay as they are, since tidying them up would break code.
    """
    text: str = tokenizer.decode(list(tokens), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
    return text


def prompt_text(tokenizer: Any, tokens: Iterable[int]) -> str:
    """The text of a document's first tokens, without a character that they leave unfinished."""
    return text_of(tokenizer, tokens).rstrip(REPLACEMENT)


def continuation(tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text that new tokens add to a prompt's; SentencePiece drops the first space of a text that stands alone."""
    return text_of(tokenizer, [*prompt, *tokens])[len(text_of(tokenizer, prompt)) :]


class TextStream:
    """The text of tokens that arrive one by one; a character waits until all its bytes are there.

    What `push` returned and then `rest` make up `continuation(tokenizer, prompt, tokens)`. A token is decoded with a
    few tokens before it: a decoder treats the first token of a text in its own way and joins bytes to characters, and
    looks at no other neighbours. So this window begins with the prompt's last tokens and moves on.
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
        self._shown = len(self._text())  # characters of the window's text that belong to the prompt or were returned

    def push(self, token: int) -> str:
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
        """The text that still waits, with an unfinished character replaced."""
        return self._text()[self._shown :]

    def preview(self, tokens: Iterable[int]) -> str:
        """The text that these tokens would add if they were the last."""
        ahead = copy(self)
        return "".join([ahead.push(token) for token in tokens]) + ahead.rest()

    def _piece(self, token: int) -> str | None:
        """The vocabulary's entry; None for a special token or an id beyond the vocabulary, which have no text."""
        piece: str | None = None if token in self._hidden else self._tokenizer.convert_ids_to_tokens(token)
        return piece

    def _text(self) -> str:
        return text_of(self._tokenizer, self._window)
