"""Tells how far an evaluation is, and how long it will still take. Tested by tests/unit/evaluation/test_progress.py."""

from collections.abc import Callable, Collection, Mapping, Sequence

from app.evaluation.records import Record
from app.evaluation.rows import Item
from app.evaluation.task import AnswerExample, ChoiceExample, TextExample
from app.progress_log import TimeLeft

_SECONDS_BETWEEN = 5.0
_CHARACTERS_A_TOKEN = 4
_GENERATED = 20  # a generated token takes as long as this many that are read


class Progress:
    """Says so every few seconds, at the end of a batch, whose examples are done all at once.

    What is left is judged by the length of the texts.
    """

    def __init__(
        self,
        items: Mapping[str, Sequence[Item]],
        finished: Collection[tuple[str, int]],
        say: Callable[[str], None] | None,
        *,
        batch_size: int = 1,
    ) -> None:
        self._say, self._batch_size = say, batch_size
        self._sizes = {(task, item.row): _size(item) for task, own in items.items() for item in own}
        self._totals = {task: len(own) for task, own in items.items()}
        self._counts = {task: sum((task, item.row) in finished for item in own) for task, own in items.items()}
        self._new = dict.fromkeys(items, 0)
        left = sum(size for key, size in self._sizes.items() if key not in finished)
        self._time_left = TimeLeft(left, seconds_between=_SECONDS_BETWEEN)

    def count(self, record: Record) -> None:
        """Count an example that is done."""
        self._counts[record.task] += 1
        self._new[record.task] += 1
        at_end = self._counts[record.task] == self._totals[record.task]
        is_time = self._time_left.add(self._sizes[record.task, record.row])
        if self._say is not None and (at_end or (is_time and self._new[record.task] % self._batch_size == 0)):
            count = f"{self._counts[record.task]} of {self._totals[record.task]}"
            self._say(f"{record.task}: {count} examples, {self._time_left.in_words()}")


def _size(item: Item) -> float:
    """The text of an item in characters, and what it lets the model write as so many more."""
    match item.example:
        case ChoiceExample(context, choices, _):
            return len(context) + sum(map(len, choices)) + 1
        case AnswerExample(prompt, _, _, max_new_tokens):
            return len(prompt) + _GENERATED * _CHARACTERS_A_TOKEN * max_new_tokens
        case TextExample(text, _):
            return len(text) + 1
        case window:
            return _CHARACTERS_A_TOKEN * len(window.tokens)
