"""COPA (Roemmele et al. 2011): which of two sentences is the cause or the effect of a premise.

Tested by tests/unit/evaluation/test_rows.py.
"""

from app.evaluation.task import ChoiceExample, ChoiceTask, HubRows, Row

_CONNECTORS = {"cause": "because", "effect": "therefore"}


def _example(row: Row) -> ChoiceExample:
    if (asked := row.text("question")) not in _CONNECTORS:
        raise row.wrong("question", " | ".join(_CONNECTORS))
    choices = tuple(f" {text[:1].lower()}{text[1:]}" for text in (row.text("choice1"), row.text("choice2")))
    premise = row.text("premise").strip().removesuffix(".")
    return ChoiceExample(f"{premise} {_CONNECTORS[asked]}", choices, answer=row.index("label", count=2))


COPA = ChoiceTask(
    name="copa",
    hub=HubRows(path="aps/super_glue", config="copa", split="validation", shots_split="train"),
    example=_example,
)
