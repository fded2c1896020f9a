"""Questions without choices, answered from memory: NaturalQuestions (Lee et al. 2019) and TriviaQA (Joshi et al. 2017).

Prompts and ends of answers are those of lm-evaluation-harness (which doubles the question mark of TriviaQA), with five
worked examples by default; normalisations are those of the datasets' own papers, see `app/evaluation/scores.py`.
"""

from collections.abc import Iterator
from dataclasses import replace

from app.evaluation.scores import exact_match, question_answer, trivia_answer
from app.evaluation.task import AnswerExample, GenerationTask, HubRows, Row

_STOP = ("\n", ".", ",")
_MAX_NEW_TOKENS = 32


def _natural_question(row: Row) -> AnswerExample:
    references = tuple(f" {answer}" for answer in row.texts("answer"))
    return AnswerExample(f"Q: {row.text('question')}?\nA:", references, stop=_STOP, max_new_tokens=_MAX_NEW_TOKENS)


def _trivia_questions(row: Row) -> Iterator[Row]:
    """A row for each question; the authors' own file is one object with all of them, and its names have capitals."""
    if "Data" not in row:
        yield row
        return
    if not (isinstance(questions := row.value("Data"), list) and all(isinstance(each, dict) for each in questions)):
        raise row.wrong("Data", "a list of objects")
    for number, values in enumerate(questions, start=1):
        of_authors = replace(row, values=values, location=f"{row.location}, question {number}")
        answer = of_authors.value("Answer")
        if isinstance(answer, dict):
            answer = {"value": answer.get("Value"), "aliases": answer.get("Aliases")}
        yield replace(of_authors, values={"question": of_authors.value("Question"), "answer": answer})


def _trivia(row: Row) -> AnswerExample:
    answer = row.value("answer")
    value, aliases = (answer.get("value"), answer.get("aliases")) if isinstance(answer, dict) else (None, None)
    if not (isinstance(value, str) and isinstance(aliases, list) and all(isinstance(each, str) for each in aliases)):
        raise row.wrong("answer", "an object with a text `value` and a list of texts `aliases`")
    references = tuple(f" {each}" for each in (value, *aliases))
    prompt = f"Question: {row.text('question')}\nAnswer:"
    return AnswerExample(prompt, references, stop=_STOP, max_new_tokens=_MAX_NEW_TOKENS)


NQ_OPEN = GenerationTask(
    name="nq_open",
    hub=HubRows(path="google-research-datasets/nq_open", split="validation", shots_split="train"),
    num_shots=5,
    description=lambda row: "Answer these questions:\n\n",  # noqa: ARG005
    example=_natural_question,
    score=lambda text, example: {"exact_match": exact_match(text, example.references, question_answer)},
)
TRIVIAQA = GenerationTask(
    name="triviaqa",
    hub=HubRows(path="mandarjoshi/trivia_qa", config="rc.nocontext", split="validation", shots_split="train"),
    unfold=_trivia_questions,
    num_shots=5,
    example=_trivia,
    score=lambda text, example: {"exact_match": exact_match(text, example.references, trivia_answer)},
)
