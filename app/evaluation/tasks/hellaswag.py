"""HellaSwag (Zellers et al. 2019): how a described scene goes on.

Tested by tests/unit/evaluation/test_rows.py.
"""

import re

from app.evaluation.task import ChoiceExample, ChoiceTask, HubRows, Row


def _example(row: Row) -> ChoiceExample:
    scene = f"{row.text('ctx_a')} {row.text('ctx_b').capitalize()}" if "ctx_a" in row else row.text("ctx")
    if "activity_label" in row:
        scene = f"{row.text('activity_label')}: {scene}"
    endings = row.texts("endings", least=2)
    choices = tuple(f" {_without_markup(ending)}" for ending in endings)
    return ChoiceExample(_without_markup(scene), choices, answer=row.index("label", count=len(endings)))


def _without_markup(text: str) -> str:
    """The text without what WikiHow's pages left in it: [title], [step] and the like."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


HELLASWAG = ChoiceTask(
    name="hellaswag",
    hub=HubRows(path="Rowan/hellaswag", split="validation", shots_split="train"),
    example=_example,
    metric="acc_norm",
)
