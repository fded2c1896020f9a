"""MMLU (Hendrycks et al. 2021): exam questions of 57 subjects, after five worked examples of the subject.

Tested by tests/unit/evaluation/test_rows.py.
"""

from app.evaluation.task import ChoiceExample, ChoiceTask, HubRows, Row

_LETTERS = "ABCD"


def _example(row: Row) -> ChoiceExample:
    if "choices" in row:  # as on the hub
        options, answer = row.texts("choices", least=4), row.index("answer", count=4)
    else:  # as in the authors' files
        options, answer = tuple(row.text(letter) for letter in _LETTERS), row.letter("answer")
    lines = [f"{letter}. {option}" for letter, option in zip(_LETTERS, options, strict=True)]
    context = "\n".join([row.text("question").strip(), *lines, "Answer:"])
    return ChoiceExample(context, tuple(f" {letter}" for letter in _LETTERS), answer)


def _subject(row: Row) -> str:
    return row.text("subject") if "subject" in row else row.source.removesuffix("_test").removesuffix("_dev")


def _description(row: Row) -> str:
    subject = _subject(row).replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {subject}.\n\n"


MMLU = ChoiceTask(
    name="mmlu",
    hub=HubRows(path="cais/mmlu", config="all", split="test", shots_split="dev"),
    csv_columns=("question", *_LETTERS, "answer"),
    num_shots=5,
    description=_description,
    group=_subject,
    example=_example,
)
