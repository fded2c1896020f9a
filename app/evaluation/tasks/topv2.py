"""TOPv2 (Chen et al. 2020): the semantic parse of an utterance, for models that were trained to write it.

The prompt is that of `datamodules.TOPv2DataModule`; answers may be written as parses or in our JSON form. Figures are
those of `callbacks.ParseValidation`, and `intent_match`: whether the first intent that the answer names is the right
one, however the answer goes on. It is what classification by intent would get.
"""

import re

from app.evaluation.task import AnswerExample, GenerationTask, HubRows, Row
from app.topv2.metrics import judge
from app.topv2.semantic_parse import ParseError, TargetFormat, read_parse

_COLUMNS = ("semantic_parse", "seqlogical")  # the second is that of the low-resource splits


def _example(row: Row) -> AnswerExample:
    column = next((name for name in _COLUMNS if name in row), _COLUMNS[0])
    try:
        read_parse(parse := row.text(column))
    except ParseError as error:
        raise row.wrong(column, f"a semantic parse ({error})") from error
    return AnswerExample(f"{row.text('utterance')} =>", (f" {parse}",), max_new_tokens=128)


def _score(text: str, example: AnswerExample) -> dict[str, float]:
    target_format: TargetFormat = "json" if text.lstrip().startswith("{") else "parse"
    right = read_parse(example.references[0])
    hits = judge(text.strip(), right, target_format=target_format)
    intent = re.search(r"IN:[A-Z0-9_]+", text)
    return {
        **{name: float(hit) for name, hit in hits._asdict().items()},
        "intent_match": float(intent is not None and intent[0] == right.label),
    }


TOPV2 = GenerationTask(
    name="topv2",
    hub=HubRows(path="WillHeld/top_v2", split="test"),
    group=lambda row: row.text("domain"),
    example=_example,
    score=_score,
)
