"""Summaries of news, scored by ROUGE-2: CNN/DM (See et al. 2017) and XSUM (Narayan et al. 2018).

The prompt is that of lm-evaluation-harness for CNN/DM. As in the paper, CNN/DM has one worked example and XSUM none.
"""

from app.evaluation.scores import rouge_2
from app.evaluation.task import AnswerExample, GenerationTask, HubRows, Row


def _example(article: str, summary: str, *, stop: str) -> AnswerExample:
    prompt = f"Summarize the following article:\n\n{article}\n\nSummary:"
    return AnswerExample(prompt, (f" {summary}",), stop=(stop, "Summarize the following"), max_new_tokens=128)


def _cnn_dm(row: Row) -> AnswerExample:
    return _example(row.text("article"), row.text("highlights"), stop="\n\n")  # highlights are several lines


def _xsum(row: Row) -> AnswerExample:
    return _example(row.text("document"), row.text("summary"), stop="\n")


def _score(text: str, example: AnswerExample) -> dict[str, float]:
    return {"rouge2": rouge_2(text, example.references)}


CNN_DM = GenerationTask(
    name="cnn_dm",
    hub=HubRows(path="abisee/cnn_dailymail", config="3.0.0", split="test", shots_split="train"),
    num_shots=1,
    example=_cnn_dm,
    score=_score,
)
XSUM = GenerationTask(
    name="xsum",
    hub=HubRows(path="EdinburghNLP/xsum", split="test", shots_split="train"),
    example=_xsum,
    score=_score,
)
