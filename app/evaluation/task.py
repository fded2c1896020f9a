"""What a task of evaluation is: where its rows come from, and how a row becomes an example that is scored.

A task is one file in `app/evaluation/tasks`. All that it has of its own is the wording of its prompts; reading rows,
running the model, scoring, tables and figures are shared. `app/README.md` shows how to add one.
Tested by tests/unit/evaluation/test_rows.py.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from app.errors import DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")  # of the files that every task reads
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class ChoiceExample(NamedTuple):
    """A question whose answer is the choice that the model finds most likely after the context.

    Attributes:
        context: The prompt, without white space at its end; the model runs it once for all choices.
        choices: The text of each choice, which begins with a space where it follows a word.
        answer: Index of the right one.
        openings: For each choice the text between context and choice, which is run and not scored; () where there is
            none. WinoGrande needs it, which scores one sentence's end after each of two beginnings.
    """

    context: str
    choices: tuple[str, ...]
    answer: int
    openings: tuple[str, ...] = ()

    def opening(self, choice: int) -> str:
        return self.openings[choice] if self.openings else ""

    @property
    def solved(self) -> str:
        """The context with the right answer, as it stands before the question that is to be answered."""
        return self.context + self.opening(self.answer) + self.choices[self.answer]

    def after(self, prefix: str) -> "ChoiceExample":
        return self._replace(context=prefix + self.context)


class AnswerExample(NamedTuple):
    """A prompt that the model continues, and what is known of the right continuation.

    Attributes:
        prompt: The text to continue.
        references: Right answers, of which one is enough.
        stop: Texts at which the answer ends; they are no part of it.
        max_new_tokens: Most tokens of the answer.
        data: Whatever else the task's `score` needs, such as a program's tests.
    """

    prompt: str
    references: tuple[str, ...]
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 256
    data: Mapping[str, Any] = _NOTHING

    @property
    def solved(self) -> str:
        """The prompt with its first reference, as it stands before the prompt that is to be continued."""
        return self.prompt + self.references[0]

    def after(self, prefix: str) -> "AnswerExample":
        return self._replace(prompt=prefix + self.prompt)


class TextExample(NamedTuple):
    """A text of which the perplexity is measured, and the name of the source that it counts for."""

    text: str
    source: str


class Window(NamedTuple):
    """A piece of a document as token ids, each of which is predicted from those before it, but for the first."""

    tokens: tuple[int, ...]


Example = ChoiceExample | AnswerExample | TextExample | Window


@dataclass(frozen=True)
class Row:
    """A row of a dataset, whose columns are read by type; what does not fit is a DataError that names it all.

    Attributes:
        values: The columns by name.
        location: File and row, as messages name them.
        source: Name of the file without its ending; "" for rows of the hub.
    """

    values: Mapping[str, Any]
    location: str
    source: str = ""

    def __contains__(self, column: str) -> bool:
        return column in self.values

    def value(self, column: str) -> Any:
        """What the column holds, of any type."""
        if column not in self.values:
            raise DataError(f"{self.location}: there is no column {column!r}, only {', '.join(map(str, self.values))}")
        return self.values[column]

    def text(self, column: str) -> str:
        found: str = self._as(str, column, "a text")
        return found

    def truth(self, column: str) -> bool:
        found: bool = self._as(bool, column, "true or false")
        return found

    def texts(self, column: str, *, least: int = 1) -> tuple[str, ...]:
        """A list of texts, at least so many."""
        found = self.value(column)
        if not (isinstance(found, list) and all(isinstance(each, str) for each in found) and len(found) >= least):
            raise self.wrong(column, f"a list of texts, at least {least}")
        return tuple(found)

    def index(self, column: str, *, count: int, first: int = 0) -> int:
        """An index in 0..count-1, given as a number, or as its digits, that is counted from `first`."""
        found = self.value(column)
        digits = isinstance(found, str) and found.strip().isdecimal()
        number = int(found) if digits or isinstance(found, int) else None
        if number is None or not first <= number < first + count:
            raise self.wrong(column, f"{first}..{first + count - 1}, the number of one of {count} choices")
        return number - first

    def letter(self, column: str, *, among: str = "ABCD") -> int:
        """The index of a letter, such as 2 for C."""
        found = self.text(column).strip()
        if len(found) != 1 or found not in among:
            raise self.wrong(column, f"one of the letters {among}")
        return among.index(found)

    def labelled(self, choices: str, answer: str) -> tuple[tuple[str, ...], int]:
        """Texts with labels and the index of the one that is labelled right.

        They are `{"text": [...], "label": [...]}`, or a list of objects with one `text` and `label` each.
        """
        found = self.value(choices)
        if isinstance(found, list) and all(isinstance(each, dict) for each in found):
            found = {key: [each.get(key) for each in found] for key in ("text", "label")}
        texts, labels = (found.get(key) for key in ("text", "label")) if isinstance(found, dict) else (None, None)
        if not (isinstance(texts, list) and isinstance(labels, list) and 1 < len(texts) == len(labels)):
            raise self.wrong(choices, 'an object of two lists of equal length, "text" and "label"')
        if not all(isinstance(text, str) for text in texts):
            raise self.wrong(choices, "a text for each choice")
        if (right := self.text(answer).strip()) not in labels:
            raise self.wrong(answer, f"one of the labels {', '.join(map(str, labels))}")
        return tuple(texts), labels.index(right)

    def unnested(self, column: str) -> "Row":
        """The row with the columns of the object in `column` beside its own; the row itself if no object is there."""
        found = self.values.get(column)
        return replace(self, values={**self.values, **found}) if isinstance(found, dict) else self

    def wrong(self, column: str, allowed: str) -> DataError:
        """The error about what a column of this row holds."""
        got = repr(self.values[column])
        return DataError(
            f"{self.location}, column {column!r}: got {got if len(got) <= 80 else got[:77] + '...'}, allowed {allowed}"
        )

    def _as(self, kind: type, column: str, allowed: str) -> Any:
        if not isinstance(found := self.value(column), kind):
            raise self.wrong(column, allowed)
        return found


@dataclass(frozen=True, kw_only=True)
class HubRows:
    """A dataset of the Hugging Face hub, read by the `datasets` library without running code of the dataset.

    Attributes:
        path, config, revision: Which dataset.
        split: The split that is scored. In a local folder, the files that bear its name are.
        shots_split: The split that worked examples are taken from, None if there are none.
    """

    path: str
    split: str
    config: str | None = None
    shots_split: str | None = None
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What every kind of task has.

    Attributes:
        name: How the command line and the results call it.
        hub: Where its rows come from unless a local file or folder is given.
        csv_columns: The columns of CSV files that have no header.
        suffixes: The endings of the files that it reads.
        unfold: The rows that a row of a file holds, where authors publish several questions as one.
        num_shots: How many worked examples stand before a question unless the user says otherwise.
        description: The text that stands before everything, given the row.
        group: What a row belongs to, such as a subject: worked examples are of the same group, a limit of rows takes as
            many of each, and results are told by group, too. "" for all rows alike.
    """

    name: str
    hub: HubRows | None
    csv_columns: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = SUFFIXES
    unfold: Callable[[Row], Iterable[Row]] = lambda row: (row,)
    num_shots: int = 0
    description: Callable[[Row], str] = field(default=lambda row: "")  # noqa: ARG005
    group: Callable[[Row], str] = field(default=lambda row: "")  # noqa: ARG005


@dataclass(frozen=True, kw_only=True)
class ChoiceTask(_Task):
    """Multiple choice by log-likelihood.

    Attributes:
        metric: What tables and figures show: acc (the likeliest choice), or acc_norm (the likeliest by its length).
    """

    example: Callable[[Row], ChoiceExample]
    metric: Literal["acc", "acc_norm"] = "acc"


@dataclass(frozen=True, kw_only=True)
class GenerationTask(_Task):
    """A task that is scored on what the model writes, by `score` or by running `program`; it has one of the two.

    Attributes:
        score: The figures of an answer, by metric, each between 0 and 1; the model's text has no stop text at its end.
        program: The program that an answer makes, which comes to its last line only if the answer is right. The metric
            is pass@1. The user must allow it, since the model wrote a part of the program.
    """

    example: Callable[[Row], AnswerExample]
    score: Callable[[str, AnswerExample], dict[str, float]] | None = None
    program: Callable[[str, AnswerExample], str] | None = None


@dataclass(frozen=True, kw_only=True)
class TextTask(_Task):
    """Perplexity of texts, by source."""

    example: Callable[[Row], TextExample]


Task = ChoiceTask | GenerationTask | TextTask
