"""`layerskip generate` in this process, on tiny models."""

import json

import pytest

from tests.support.runs import cli
from tests.support.saved_models import save_model

PROMPT = "the end of"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def draft_model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("draft_model"), num_layers=1, seed=1)


@pytest.fixture
def generate(model, draft_model, monkeypatch, capsys):
    """Run the verb; its standard streams."""

    def run(*arguments, prompt=PROMPT, model=model, status=0):
        capsys.readouterr()
        arguments = [str(draft_model if argument == "DRAFT_MODEL" else argument) for argument in arguments]
        given = [] if prompt is None else ["--prompt", prompt]
        assert cli(monkeypatch, "generate", "--model", str(model), *given, *arguments) == status
        return capsys.readouterr()

    return run


@pytest.fixture
def generate_json(generate):
    """The objects it prints."""
    return lambda *arguments, **options: list(
        map(json.loads, generate(*arguments, "--json", **options).out.split("\n")[:-1])
    )
