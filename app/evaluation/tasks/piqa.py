"""PIQA (Bisk et al. 2020): which of two ways reaches an everyday goal.

Tested by tests/unit/evaluation/test_rows.py.
"""

from app.evaluation.task import ChoiceExample, ChoiceTask, HubRows, Row


def _example(row: Row) -> ChoiceExample:
    choices = (f" {row.text('sol1')}", f" {row.text('sol2')}")
    return ChoiceExample(f"Question: {row.text('goal')}\nAnswer:", choices, answer=row.index("label", count=2))


PIQA = ChoiceTask(
    name="piqa",
    hub=HubRows(path="baber/piqa", split="validation", shots_split="train"),
    example=_example,
    metric="acc_norm",
)
