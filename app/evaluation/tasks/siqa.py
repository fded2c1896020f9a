"""Social IQa (Sap et al. 2019): what people feel or do next.

Tested by tests/unit/evaluation/test_rows.py.
"""

from app.evaluation.task import ChoiceExample, ChoiceTask, HubRows, Row


def _example(row: Row) -> ChoiceExample:
    choices = tuple(f" {row.text(column)}" for column in ("answerA", "answerB", "answerC"))
    context = f"Q: {row.text('context')} {row.text('question')}\nA:"
    return ChoiceExample(context, choices, answer=row.index("label", count=3, first=1))


SIQA = ChoiceTask(
    name="siqa", hub=HubRows(path="lighteval/siqa", split="validation", shots_split="train"), example=_example
)
