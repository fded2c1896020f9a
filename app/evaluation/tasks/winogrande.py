"""WinoGrande (Sakaguchi et al. 2021): which of two names fills the gap of a sentence.

What is scored is the sentence behind the gap, after each of the two names.

Tested by tests/unit/evaluation/test_rows.py.
"""

from app.evaluation.task import ChoiceExample, ChoiceTask, HubRows, Row

_GAP = "_"


def _example(row: Row) -> ChoiceExample:
    before, gap, rest = row.text("sentence").partition(_GAP)
    if not gap or not rest.strip():
        raise row.wrong("sentence", f"a sentence with a gap {_GAP!r} and text behind it")
    space = " " if before.endswith(" ") else ""
    openings = (space + row.text("option1"), space + row.text("option2"))
    choices = (f" {rest.strip()}",) * 2
    return ChoiceExample(before.rstrip(), choices, answer=row.index("answer", count=2, first=1), openings=openings)


WINOGRANDE = ChoiceTask(
    name="winogrande",
    hub=HubRows(path="allenai/winogrande", config="winogrande_xl", split="validation", shots_split="train"),
    example=_example,
)
