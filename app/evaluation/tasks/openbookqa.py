"""OpenBookQA (Mihaylov et al. 2018): questions that a fact of elementary science answers.

Tested by tests/unit/evaluation/test_rows.py.
"""

from app.evaluation.task import ChoiceExample, ChoiceTask, HubRows, Row
from app.evaluation.tasks.arc import read_question


def _example(row: Row) -> ChoiceExample:
    return ChoiceExample(*read_question(row, "question_stem"))


OPENBOOKQA = ChoiceTask(
    name="openbookqa",
    hub=HubRows(path="allenai/openbookqa", config="main", split="test", shots_split="train"),
    example=_example,
    metric="acc_norm",
)
