"""COPA (Roemmele et al. 2011): which of two sentences is the cause or the effect of a premise.

Tested by tests/unit/evaluation/test_rows.py.
"""

from app.evaluation.task import SUFFIXES, ChoiceExample, ChoiceTask, HubRows, Row

_CONNECTORS = {"cause": "because", "effect": "therefore"}
# The columns of SuperGLUE's rows and of the authors' XML, and the number of the first choice in the last one.
_SUPERGLUE = ("premise", "choice1", "choice2", "question", "label", 0)
_XML = ("p", "a1", "a2", "asks-for", "most-plausible-alternative", 1)


def _example(row: Row) -> ChoiceExample:
    premise, *choices, question, answer, first = _XML if "asks-for" in row else _SUPERGLUE
    if (asked := row.text(question)) not in _CONNECTORS:
        raise row.wrong(question, " | ".join(_CONNECTORS))
    texts = tuple(f" {text[:1].lower()}{text[1:]}" for text in map(row.text, choices))
    context = f"{row.text(premise).strip().removesuffix('.')} {_CONNECTORS[asked]}"
    return ChoiceExample(context, texts, answer=row.index(answer, count=2, first=first))


COPA = ChoiceTask(
    name="copa",
    hub=HubRows(path="aps/super_glue", config="copa", split="validation", shots_split="train"),
    suffixes=(*SUFFIXES, ".xml"),
    example=_example,
)
