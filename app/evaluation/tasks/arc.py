"""ARC (Clark et al. 2018): science questions of school exams, easy ones and those that retrieval does not answer.

Tested by tests/unit/evaluation/test_rows.py.
"""

from app.evaluation.task import ChoiceExample, ChoiceTask, HubRows, Row


def read_question(row: Row, column: str) -> tuple[str, tuple[str, ...], int]:
    """Return a question, its choices as continuations, and the index of the right one.

    The hub's rows hold the question in `column`. In the authors' own files, those of OpenBookQA among them, the column
    `question` is an object with a `stem` and the choices.
    """
    row = row.unnested("question")
    texts, answer = row.labelled("choices", "answerKey")
    return row.text("stem" if "stem" in row else column), tuple(f" {text}" for text in texts), answer


def _example(row: Row) -> ChoiceExample:
    question, choices, answer = read_question(row, "question")
    return ChoiceExample(f"Question: {question}\nAnswer:", choices, answer)


def _task(name: str, config: str) -> ChoiceTask:
    hub = HubRows(path="allenai/ai2_arc", config=config, split="test", shots_split="train")
    return ChoiceTask(name=name, hub=hub, example=_example, metric="acc_norm")


ARC_EASY = _task("arc_easy", "ARC-Easy")
ARC_CHALLENGE = _task("arc_challenge", "ARC-Challenge")
