"""Each generation task by a row in its dataset's form: prompt, worked example, score or program."""

from typing import Any

import pytest

from app.errors import DataError
from app.evaluation.programs import ProgramRunner
from app.evaluation.task import AnswerExample, GenerationTask, Row
from app.evaluation.tasks import TASKS


def _example(task: str, **values: Any) -> tuple[GenerationTask, AnswerExample]:
    found = TASKS[task]
    assert isinstance(found, GenerationTask)
    return found, found.example(Row(values, "file, row 1"))


def _score(task: GenerationTask, text: str, example: AnswerExample) -> dict[str, float]:
    assert task.score is not None
    return task.score(text, example)


def test_gsm8k() -> None:
    task, example = _example("gsm8k", question="How many?", answer="2 + 2 = <<2+2=4>>4\n#### 1,004")
    assert example.solved == "Question: How many?\nAnswer: 2 + 2 = <<2+2=4>>4\n#### 1,004"
    assert _score(task, " It is 4.\n#### 1004.", example) == {"exact_match": 1.0, "exact_match_flexible": 1.0}
    assert _score(task, " It is 1004", example) == {"exact_match": 0.0, "exact_match_flexible": 1.0}
    assert _score(task, " no idea", example) == {"exact_match": 0.0, "exact_match_flexible": 0.0}


def test_questions_from_memory() -> None:
    task, example = _example("nq_open", question="who sang it", answer=["The Beatles", "John"])
    assert example.solved == "Q: who sang it?\nA: The Beatles"
    assert _score(task, " beatles", example) == _score(task, "john", example) == {"exact_match": 1.0}
    assert _score(task, " the beatles and john", example) == {"exact_match": 0.0}
    answer = {"value": "Sinclair Lewis", "aliases": ["Harry Sinclair Lewis"], "type": "WikipediaEntity"}
    task, example = _example("triviaqa", question="Who wrote it?", answer=answer)
    assert example.solved == "Question: Who wrote it?\nAnswer: Sinclair Lewis"
    assert _score(task, " harry sinclair-lewis", example) == {"exact_match": 1.0}


def test_summaries() -> None:
    task, example = _example("cnn_dm", article="A cat sat.", highlights="Cat sat .\nIt slept .")
    assert example.solved == "Summarize the following article:\n\nA cat sat.\n\nSummary: Cat sat .\nIt slept ."
    assert (task.num_shots, _score(task, " The cat sat", example)) == (1, {"rouge2": pytest.approx(0.4)})
    task, example = _example("xsum", document="A cat sat.", summary="cat sat")
    assert (task.num_shots, _score(task, "cat sat", example)) == (0, {"rouge2": 1.0})
    assert "\n" in example.stop


@pytest.fixture(scope="module")
def runner() -> ProgramRunner:
    return ProgramRunner()


def test_programs_pass_with_the_right_answer_alone(runner: ProgramRunner) -> None:
    tests = "METADATA = {}\n\ndef check(candidate):\n    assert candidate(1) == 2\n"
    prompt = 'def inc(x):\n    """Add one."""\n'
    task, example = _example(
        "humaneval", prompt=prompt, canonical_solution="    return x + 1\n", test=tests, entry_point="inc"
    )
    assert task.program is not None
    assert example.solved == prompt + "    return x + 1\n"
    assert not example.prompt.endswith("\n")
    assert runner.run(task.program(example.references[0], example)).outcome == "passed"
    assert runner.run(task.program("\n    return x", example)).outcome == "failed"
    values = {"text": "Add one.", "code": "def inc(x):\n    return x + one", "test_setup_code": "one = 1"}
    task, example = _example("mbpp", **values, test_list=["assert inc(1) == 2", "assert inc(2) == 3"])
    assert task.program is not None
    assert example.prompt.endswith(
        "Add one. Your code should pass these tests:\n\nassert inc(1) == 2\nassert inc(2) == 3\n[BEGIN]\n"
    )
    answer = example.references[0].removesuffix("\n[DONE]")
    assert runner.run(task.program(answer, example)).outcome == "passed"
    assert runner.run(task.program("def inc(x):\n    return 2", example)).outcome == "failed"
    sanitised = {"prompt": "Add one.", "code": values["code"], "test_imports": ["import math", "one = 1"]}
    _, same = _example("mbpp", **sanitised, test_list=["assert inc(1) == 2", "assert inc(2) == 3"])
    assert same == example._replace(data={**example.data, "setup": "import math\none = 1"})


def test_topv2_reads_answers_in_both_forms() -> None:
    task, example = _example("topv2", domain="weather", utterance="rain ?", semantic_parse="[IN:GET_WEATHER rain ? ]")
    assert example.solved == "rain ? => [IN:GET_WEATHER rain ? ]"
    right = {"exact_match": 1.0, "frame_match": 1.0, "well_formed": 1.0, "intent_match": 1.0}
    assert _score(task, " [IN:GET_WEATHER rain ?]", example) == right
    assert _score(task, ' {"IN:GET_WEATHER":"rain ?"}', example) == right
    assert _score(task, " [IN:GET_WEATHER ]", example) == right | {"exact_match": 0.0}
    wrong = dict.fromkeys(right, 0.0)
    assert _score(task, " [IN:GET_WEATHER", example) == wrong | {"intent_match": 1.0}
    assert _score(task, ' {"IN:GET_WEATHER_X":"IN:GET_WEATHER"}', example) == wrong | {"well_formed": 1.0}
    assert _score(task, " rain", example) == wrong


@pytest.mark.parametrize(
    ("task", "values", "message"),
    [
        ("gsm8k", {"question": "?", "answer": "4"}, "row 1, column 'answer': got '4', allowed a solution that ends in"),
        (
            "triviaqa",
            {"question": "?", "answer": ["x"]},
            "column 'answer': got .*allowed an object with a text `value`",
        ),
        ("topv2", {"utterance": "x", "semantic_parse": "[IN:A"}, "column 'semantic_parse': got .*no ] for IN:A"),
        ("mbpp", {"text": "x", "code": "y", "test_list": []}, "column 'test_list'"),
        ("humaneval", {"prompt": "x"}, "no column 'canonical_solution'"),
    ],
)
def test_a_row_of_another_form_is_named(task: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        _example(task, **values)
