"""Before torch is loaded: help, completion, and mistakes that show at once. Loading takes seconds, these must not."""

import os
import subprocess
import sys

import pytest

from app.cli.main import VERBS
from app.cli.parsing import help_texts

FIT_HELP = """
  -h, --help            Show this help message and exit.
  -c CONFIG, --config CONFIG
  --trainer CONFIG      Path to a configuration file.
  --trainer.callbacks.help CLASS_PATH_OR_NAME
  --trainer.callbacks CALLBACKS, --trainer.callbacks+ CALLBACKS
  --trainer.max_steps MAX_STEPS
  --model.optimizer OPTIMIZER
  --model.lr_schedule {constant,linear,cosine}
  --data.help CLASS_PATH_OR_NAME
  --data DATA
"""
WITHOUT_TORCH = """
import sys
from app.cli.main import main
status = main()
loaded = sorted({"torch", "lightning", "transformers"} & set(sys.modules))
assert not loaded, loaded
sys.exit(status)
"""


@pytest.fixture
def with_help_of_fit(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    help_texts.keep_help("fit", FIT_HELP)


def _run(*args, **environment):
    command = [sys.executable, "-c", WITHOUT_TORCH, *args]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | environment)


@pytest.mark.usefixtures("with_help_of_fit")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fit", "--config", "absent.yaml"], "config: got 'absent.yaml', allowed a YAML file (no such file or direct"),
        (["fit", "--config={trainer: {max_stepz: 3}}"], "trainer.max_stepz: unknown key; nearest: max_steps"),
        (["fit", "--config", "{trainer: {"], "error: config: "),
        (["fit", "--trainer.max_stepz=3"], "trainer.max_stepz: unknown key; nearest: max_steps"),
        (["fit", "--ckpt_path", "absent.ckpt"], "ckpt_path: got 'absent.ckpt', allowed an existing checkpoint"),
        (["fit", "--model.pretrained", "./absent"], "model.pretrained: got './absent', allowed a Hugging Face dir"),
        (["generate", "--model", "absent.gguf", "--prompt", "x"], "model: got 'absent.gguf', allowed a Hugging Face"),
        (["tune", "--prompts", "absent.jsonl"], "prompts: absent.jsonl cannot be read: No such file"),
        (["fitt"], "verb: got 'fitt', allowed fit | "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_that_shows_at_once_is_refused_without_torch(args, message):
    done = _run(*args)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr


@pytest.mark.usefixtures("with_help_of_fit")
def test_help_that_was_made_before_is_printed_without_torch():
    assert _run("fit", "--help").stdout == FIT_HELP
    verbs = _run("--help").stdout
    assert all(verb in verbs for verb in VERBS)


@pytest.mark.usefixtures("with_help_of_fit")
@pytest.mark.parametrize(
    ("line", "offered"),
    [("layerskip f", ["fit"]), ("layerskip fit --trainer.max_", ["--trainer.max_steps"]),
     ("layerskip fit --model.lr_schedule c", ["constant", "cosine"])],
)  # fmt: skip
def test_the_shell_completes_verbs_options_and_values(tmp_path, line, offered):
    answer = tmp_path / "answer"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    done = _run(**asked, _ARGCOMPLETE_STDOUT_FILENAME=str(answer))
    assert done.returncode == 0, done.stderr
    assert [word.strip() for word in answer.read_text().splitlines()] == offered


def test_the_help_of_other_files_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert help_texts.kept_help("fit") is None
    help_texts.keep_help("fit", FIT_HELP)
    assert help_texts.kept_help("fit") == FIT_HELP
    monkeypatch.setattr(help_texts, "version", lambda package: "999")
    assert help_texts.kept_help("fit") is None
