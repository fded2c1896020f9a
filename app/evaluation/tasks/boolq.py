"""BoolQ (Clark et al. 2019): a yes-or-no question about a passage.

Tested by tests/unit/evaluation/test_rows.py.
"""

from app.evaluation.task import ChoiceExample, ChoiceTask, HubRows, Row


def _example(row: Row) -> ChoiceExample:
    context = f"{row.text('passage')}\nQuestion: {row.text('question')}?\nAnswer:"
    return ChoiceExample(context, choices=(" no", " yes"), answer=int(row.truth("answer")))


BOOLQ = ChoiceTask(
    name="boolq", hub=HubRows(path="google/boolq", split="validation", shots_split="train"), example=_example
)
