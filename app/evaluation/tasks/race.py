"""RACE (Lai et al. 2017): questions about texts of English exams in Chinese schools, by default of high schools.

Tested by tests/unit/evaluation/test_rows.py.
"""

from app.evaluation.task import ChoiceExample, ChoiceTask, HubRows, Row


def _example(row: Row) -> ChoiceExample:
    options, answer = row.texts("options", least=4), row.letter("answer")
    context = f"Article: {row.text('article')}\n\nQuestion: {row.text('question')}\nAnswer:"
    return ChoiceExample(context, tuple(f" {option}" for option in options), answer)


RACE = ChoiceTask(
    name="race", hub=HubRows(path="ehovy/race", config="high", split="test", shots_split="train"), example=_example
)
