"""GSM8K (Cobbe et al. 2021): school arithmetic in words; exact match of the final number, as in lm-evaluation-harness.

`exact_match` takes the number after "####", `exact_match_flexible` the last number of the answer.
"""

from app.evaluation.scores import exact_match, final_number, last_number
from app.evaluation.task import AnswerExample, GenerationTask, HubRows, Row


def _example(row: Row) -> AnswerExample:
    answer = row.text("answer")
    if not final_number(answer):
        raise row.wrong("answer", 'a solution that ends in "#### " and a number')
    return AnswerExample(
        prompt=f"Question: {row.text('question')}\nAnswer:",
        references=(f" {answer}",),
        stop=("Question:", "</s>", "<|im_end|>"),
        max_new_tokens=256,
    )


def _score(text: str, example: AnswerExample) -> dict[str, float]:
    right = [final_number(reference) for reference in example.references]
    return {
        "exact_match": exact_match(final_number(text), right),
        "exact_match_flexible": exact_match(last_number(text), right),
    }


GSM8K = GenerationTask(
    name="gsm8k",
    hub=HubRows(path="openai/gsm8k", config="main", split="test", shots_split="train"),
    num_shots=5,
    example=_example,
    score=_score,
)
