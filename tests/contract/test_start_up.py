"""Before torch is loaded: help, completion, and mistakes that show at once. Loading takes seconds, these must not."""

import json
import os
import subprocess
import sys

from app.cli import main
from app.cli.parsing import help_texts

FIT_HELP = """
  -h, --help            Show this help message and exit.
  -c CONFIG, --config CONFIG
  --trainer CONFIG      Path to a configuration file.
  --trainer.callbacks.help CLASS_PATH_OR_NAME
  --trainer.callbacks CALLBACKS, --trainer.callbacks+ CALLBACKS
  --trainer.max_steps MAX_STEPS
                        Stop after this number of steps. (type: int, default: -1)
  --trainer.precision PRECISION
                        Default: ``'32-true'``. (type: Union[Literal[32, 16], Literal['transformer-
                        engine', '16-mixed',  'bf16-mixed'], Literal['32', '16', 'bf16'], null],
                        default: null)
  --trainer.deterministic DETERMINISTIC
                        Default: ``False``. (type: Union[bool, Literal['warn'], null], default: null)
  --model.optimizer OPTIMIZER
  --model.lr_schedule {constant,linear,cosine}
  --data.help CLASS_PATH_OR_NAME
  --data DATA
"""
PLAN_HELP = """
  --devices DEVICES     Number of devices. (type: int | null, default: null)
"""
REPORT_HELP = """
positional arguments:
  run_dirs              Folders of runs of layerskip fit, one to six.

options:
  --output OUTPUT       File to write. (required, type: str)
"""
GENERATE_HELP = """
  --model MODEL         Lightning checkpoint of a run, Hugging Face directory, hub id or .gguf
                        file. (required, type: str)
  --prompt PROMPT       Text to continue. (type: str | null, default: null)
"""
MISTAKES = [
    (["fit", "--config", "absent.yaml"], "config: got 'absent.yaml', allowed a YAML file (no such file or direct"),
    (["fit", "--config={trainer: {max_stepz: 3}}"], "trainer.max_stepz: unknown key; nearest: max_steps"),
    (["fit", "--config", "{trainer: {"], "error: config: "),
    (["fit", "--trainer.max_stepz=3"], "trainer.max_stepz: unknown key; nearest: max_steps"),
    (["fit", "--ckpt_path", "absent.ckpt"], "ckpt_path: got 'absent.ckpt', allowed an existing checkpoint"),
    (["fit", "--model.pretrained", "./absent"], "model.pretrained: got './absent', allowed a Hugging Face dir"),
    (["generate", "--model", "absent.gguf", "--prompt", "x"], "model: got 'absent.gguf', allowed a Hugging Face"),
    (["tune", "--prompts", "absent.jsonl"], "prompts: absent.jsonl cannot be read: No such file"),
    (["generate", "--prompt", "x"], "model: required, but not given"),
    (["generate", "--config", "FOLDER/list.yaml"], "config: got '- 1', allowed YAML of the form 'option: value'"),
    (["fitt"], "verb: got 'fitt', allowed fit | "),
    (["fit", "--help"], FIT_HELP),
    (["--help"], "generate"),
]
COMPLETED = {
    "layerskip f": ["fit"],
    "layerskip fit --trainer.max_": ["--trainer.max_steps"],
    "layerskip fit --model.lr_schedule c": ["constant", "cosine"],
    "layerskip fit --trainer.precision ": ["32", "16", "transformer-engine", "16-mixed", "bf16-mixed", "bf16"],
    "layerskip plan --trainer.deterministic ": ["warn", "true", "false"],
    "layerskip plan --dev": ["--devices"],
    "layerskip report --out": ["--output"],
    "layerskip report FOLDER/ru": ["FOLDER/run/"],
}
# Each command in one process, since an import that one of them needs would be seen after it.
SCRIPT = """
import contextlib, io, json, os, sys
from app.cli.main import main

commands, lines, answer = json.loads(sys.argv[1])
said = []
for command in commands:
    sys.argv[1:] = command
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(shown):
        status = main()
    loaded = sorted({"torch", "lightning", "transformers"} & set(sys.modules))
    assert not loaded, (command, loaded)
    said.append((status, shown.getvalue()))
offered = []
for line in lines:
    asked = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_STDOUT_FILENAME": answer}
    os.environ |= asked | {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\\n"}
    if (child := os.fork()) == 0:
        main()
    assert os.waitpid(child, 0)[1] == 0, line
    offered.append([word.strip() for word in open(answer).read().splitlines()])
print(json.dumps((said, offered)))
"""


def test_help_completion_and_mistakes_that_show_at_once_are_answered_without_torch(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    help_texts.keep_help("fit", FIT_HELP)
    help_texts.keep_help("plan", PLAN_HELP)
    help_texts.keep_help("report", REPORT_HELP)
    help_texts.keep_help("generate", GENERATE_HELP)
    (tmp_path / "run").mkdir()
    completed = json.loads(json.dumps(COMPLETED).replace("FOLDER", str(tmp_path)))
    (tmp_path / "list.yaml").write_text("- 1")
    commands = json.loads(json.dumps([command for command, _ in MISTAKES]).replace("FOLDER", str(tmp_path)))
    asked = json.dumps((commands, [*completed], str(tmp_path / "answer")))
    done = subprocess.run([sys.executable, "-c", SCRIPT, asked], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, offered = json.loads(done.stdout)
    for (command, message), (status, text) in zip(MISTAKES, said, strict=True):
        assert message in text, command
        assert status == (0 if "--help" in command else 2), command
    assert offered == [*completed.values()]


def test_a_shell_that_asks_before_there_is_help_is_answered_too(tmp_path, monkeypatch):
    """Not by the parsers, which would complete for themselves, and so must not see that a shell asks."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("_ARGCOMPLETE", "1")
    monkeypatch.setattr(main, "_run", lambda verb: sys.stdout.write(f"{verb} {os.environ.get('_ARGCOMPLETE')}\n"))
    monkeypatch.setattr(sys, "argv", ["layerskip"])
    assert main._help("fit") == "fit None\n"
    assert os.environ["_ARGCOMPLETE"] == "1"


def test_the_help_of_other_files_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert help_texts.kept_help("fit") is None
    help_texts.keep_help("fit", FIT_HELP)
    assert help_texts.kept_help("fit") == FIT_HELP
    monkeypatch.setattr(help_texts, "version", lambda package: "999")
    assert help_texts.kept_help("fit") is None
