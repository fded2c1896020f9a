"""ARC (Clark et al. 2018): science questions of school exams, easy ones and those that retrieval does not answer.

Tested by tests/unit/evaluation/test_rows.py.
"""

from app.evaluation.task import ChoiceExample, ChoiceTask, HubRows, Row


def _example(row: Row) -> ChoiceExample:
    row = row.unnested("question")  # in the authors' own files it is an object
    texts, answer = row.labelled("choices", "answerKey")
    question = row.text("stem" if "stem" in row else "question")
    return ChoiceExample(f"Question: {question}\nAnswer:", tuple(f" {text}" for text in texts), answer)


def _task(name: str, config: str) -> ChoiceTask:
    hub = HubRows(path="allenai/ai2_arc", config=config, split="test", shots_split="train")
    return ChoiceTask(name=name, hub=hub, example=_example, metric="acc_norm")


ARC_EASY = _task("arc_easy", "ARC-Easy")
ARC_CHALLENGE = _task("arc_challenge", "ARC-Challenge")
