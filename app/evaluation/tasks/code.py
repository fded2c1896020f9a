"""Python functions that must pass tests: HumanEval (Chen et al. 2021) and MBPP (Austin et al. 2021), pass@1, greedy.

Prompts and ends of answers are those of lm-evaluation-harness. HumanEval's prompts lose the line break at their end, as
in bigcode-evaluation-harness: tokenizers join it with the indentation behind it, which a model does not find otherwise.
"""

from app.evaluation.task import AnswerExample, GenerationTask, HubRows, Row

_MAX_NEW_TOKENS = 512


def _humaneval(row: Row) -> AnswerExample:
    return AnswerExample(
        prompt=row.text("prompt").rstrip(),
        references=("\n" + row.text("canonical_solution"),),
        stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
        max_new_tokens=_MAX_NEW_TOKENS,
        data={"tests": f"{row.text('test')}\ncheck({row.text('entry_point')})\n"},
    )


def _humaneval_program(text: str, example: AnswerExample) -> str:
    return f"{example.prompt}{text}\n{example.data['tests']}"


def _mbpp(row: Row) -> AnswerExample:
    tests = "\n".join(row.texts("test_list"))
    if "test_imports" in row:  # the sanitised edition
        asked, setup = row.text("prompt"), "\n".join(row.texts("test_imports", least=0))
    else:
        asked, setup = row.text("text"), row.text("test_setup_code") if "test_setup_code" in row else ""
    task = f"You are an expert Python programmer, and here is your task: {asked}"
    return AnswerExample(
        prompt=f"{task} Your code should pass these tests:\n\n{tests}\n[BEGIN]\n",
        references=(f"{row.text('code')}\n[DONE]",),
        stop=("[DONE]",),
        max_new_tokens=_MAX_NEW_TOKENS,
        data={"setup": setup, "tests": tests},
    )


def _mbpp_program(text: str, example: AnswerExample) -> str:
    return f"{example.data['setup']}\n{text}\n{example.data['tests']}\n"


HUMANEVAL = GenerationTask(
    name="humaneval",
    hub=HubRows(path="openai/openai_humaneval", split="test"),
    example=_humaneval,
    program=_humaneval_program,
)
MBPP = GenerationTask(
    name="mbpp",
    hub=HubRows(path="google-research-datasets/mbpp", config="full", split="test", shots_split="prompt"),
    num_shots=3,
    example=_mbpp,
    program=_mbpp_program,
)
