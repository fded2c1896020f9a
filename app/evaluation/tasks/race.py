"""RACE (Lai et al. 2017): questions about texts of English exams in Chinese schools, by default of high schools.

Tested by tests/unit/evaluation/test_rows.py.
"""

import json
from collections.abc import Iterator
from dataclasses import replace

from app.errors import DataError, shortened
from app.evaluation.task import ChoiceExample, ChoiceTask, HubRows, Row

_BY_QUESTION = {"questions": "question", "options": "options", "answers": "answer"}


def _questions(row: Row) -> Iterator[Row]:
    """A row for each question; a file of the authors' own is a JSON object with all questions of an article."""
    if "text" not in row:
        yield row
        return
    try:
        values = json.loads(row.text("text"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{row.location}: not JSON ({shortened(error)})") from error
    if not isinstance(values, dict):
        raise DataError(f"{row.location}: got {type(values).__name__}, allowed an object with columns")
    article = replace(row, values=values)
    lists = [article.value(column) for column in _BY_QUESTION]
    if len({len(each) if isinstance(each, list) else -1 for each in lists}) != 1:
        raise article.wrong("questions", "a list as long as those of options and answers")
    for number, columns in enumerate(zip(*lists, strict=True), start=1):
        of_question = dict(zip(_BY_QUESTION.values(), columns, strict=True))
        yield replace(row, values={**values, **of_question}, location=f"{row.location}, question {number}")


def _example(row: Row) -> ChoiceExample:
    options, answer = row.texts("options", least=4), row.letter("answer")
    context = f"Article: {row.text('article')}\n\nQuestion: {row.text('question')}\nAnswer:"
    return ChoiceExample(context, tuple(f" {option}" for option in options), answer)


RACE = ChoiceTask(
    name="race",
    hub=HubRows(path="ehovy/race", config="high", split="test", shots_split="train"),
    unfold=_questions,
    example=_example,
)
