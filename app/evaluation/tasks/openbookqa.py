"""OpenBookQA (Mihaylov et al. 2018): questions that a fact of elementary science answers.

Tested by tests/unit/evaluation/test_rows.py.
"""

from app.evaluation.task import ChoiceExample, ChoiceTask, HubRows, Row


def _example(row: Row) -> ChoiceExample:
    row = row.unnested("question")  # in the authors' own files it is an object
    texts, answer = row.labelled("choices", "answerKey")
    question = row.text("stem" if "stem" in row else "question_stem")
    return ChoiceExample(question, tuple(f" {text}" for text in texts), answer)


OPENBOOKQA = ChoiceTask(
    name="openbookqa",
    hub=HubRows(path="allenai/openbookqa", config="main", split="test", shots_split="train"),
    example=_example,
    metric="acc_norm",
)
