"""Turns examples into token ids, and those that are longer than the context into what fits.

Tested by tests/unit/evaluation/test_likelihood_tasks.py.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from app.errors import DataError
from app.evaluation.likelihood import Scored
from app.evaluation.records import OnLong
from app.evaluation.rows import Item
from app.evaluation.task import ChoiceExample, TextExample, Window
from app.text.text_tokens import around


class EncodedChoices(NamedTuple):
    """The choices of an example with all that stands before each, and whether its beginning was left out."""

    choices: list[Scored]
    truncated: bool


class ExampleEncoder:
    """Encodes texts that begin as the tokenizer begins texts, and that have no end.

    What is before a text that a model scores from its first token on is the token that the tokenizer puts there, or
    else that which begins or ends texts, as in other harnesses.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._before = tokenizer, around(tokenizer).before
        first = [each for each in (tokenizer.bos_token_id, tokenizer.eos_token_id) if each is not None]
        self._first = self._before or first[:1]

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, without any that the tokenizer adds."""
        return list(self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"])

    def choices(self, item: Item, *, max_length: int, on_long: OnLong) -> EncodedChoices | None:
        """Context, opening and choice of each choice; None for a row that is too long and is to be skipped.

        A choice's tokens are those of the whole text behind the context's number of tokens. White space at the end of
        the context belongs to the choice, as tokenizers put a space before a word. (Both as in lm-evaluation-harness.)

        Raises:
            DataError: The row is longer than the context of `max_length` tokens, and is not to be cut or skipped; or a
                choice alone is.
        """
        example = item.example
        assert isinstance(example, ChoiceExample)
        contexts = [(example.context + example.opening(each)).rstrip() for each in range(len(example.choices))]
        texts = [example.context + example.opening(number) + text for number, text in enumerate(example.choices)]
        ids = self.ids([*contexts, *texts])
        begun = [self._before or ([] if context else self._first) for context in contexts]
        befores = [begin + own for begin, own in zip(begun, ids[: len(texts)], strict=True)]
        wholes = [begin + own for begin, own in zip(begun, ids[len(texts) :], strict=True)]
        choices = [
            Scored(before + whole[len(before) :], len(before)) for before, whole in zip(befores, wholes, strict=True)
        ]
        for number, choice in enumerate(choices):
            if not 1 <= choice.start < len(choice.tokens):
                raise DataError(
                    f"{item.location}: choice {example.choices[number]!r} has no token of its own behind its context"
                )
        return _fitted(choices, len(begun[0]), item, max_length=max_length, on_long=on_long)

    def windows(self, items: Sequence[Item], *, size: int) -> list[Item]:
        """Cut documents into windows of `size` tokens that are run, and each of which but a text's last is full.

        The first token of a window is the last of the one before it, so that each token of a text is scored once.
        """
        windows: list[Item] = []
        for item in items:
            document = item.example
            assert isinstance(document, TextExample)
            tokens = [*self._first, *self.ids([document.text])[0]]
            for start in range(0, len(tokens) - 1, size):
                window = Window(tuple(tokens[start : start + size + 1]))
                windows.append(Item(len(windows), document.source, item.location, window))
        return windows


def _fitted(
    choices: list[Scored], begin: int, item: Item, *, max_length: int, on_long: OnLong
) -> EncodedChoices | None:
    """Leave out what is too much behind the first `begin` tokens, as many tokens of all choices."""
    longest = max(len(choice.tokens) - 1 for choice in choices)
    if (excess := longest - max_length) <= 0:
        return EncodedChoices(choices, truncated=False)
    if on_long == "skip":
        return None
    what = f"{item.location}: got a prompt of {longest} tokens, allowed up to {max_length}, the model's context"
    if on_long == "error":
        raise DataError(f"{what}; on_long=truncate_left leaves out its beginning, and on_long=skip the row")
    if min(choice.start for choice in choices) - begin <= excess:
        raise DataError(f"{what}; its choices alone are too long, and only on_long=skip goes on")
    cut = [
        Scored([*choice.tokens[:begin], *choice.tokens[begin + excess :]], choice.start - excess) for choice in choices
    ]
    return EncodedChoices(cut, truncated=True)
