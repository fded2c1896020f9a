"""`layerskip evaluate` as its user meets it: files, tables, refusals, and a run that goes on after kill -9."""

import csv
import json
import os
import signal
from multiprocessing import get_context

import pytest
import torch
from transformers import AutoModelForCausalLM

from app.evaluation import likelihood_tasks
from app.evaluation.journal import Journal
from app.model.quantized import round_weights
from tests.support.runs import cli
from tests.support.saved_models import save_model
from tests.support.tokenizers import byte_level

TEXTS = ["the end of", "naïve café", "then more", "x = 1", "the END", "世界"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Rows of two tasks in the working directory."""
    rows = [{"question": text, "passage": text * 2, "answer": n % 3 == 0} for n, text in enumerate(TEXTS)]
    (tmp_path / "boolq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "emma.txt").write_text(" ".join(TEXTS) * 2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _evaluate(monkeypatch, model, *options, tasks="[boolq=boolq.jsonl, text=emma.txt]", exits="[2, 4]"):
    given = ["--model", model, "--tasks", tasks, "--exit_layers", exits, "--window", "24", "--output", "r.json"]
    return cli(monkeypatch, "evaluate", *given, *options)


def test_every_exit_and_task_is_in_all_files(monkeypatch, model, here, capsys):
    assert _evaluate(monkeypatch, model, exits="[4, 2, 2]") == 0
    printed = capsys.readouterr()
    assert "boolq: 6 of 6 examples, " in printed.err
    assert "guessing" in printed.out
    assert "results: r.json, table: r.csv, figure: r.png" in printed.out
    document = json.loads((here / "r.json").read_text())
    assert document["settings"]["exit_layers"] == [2, 4]
    assert document["settings"]["model"] == model
    assert document["environment"]["dtype"] == "float32"
    found = {(each["task"], each["exit_layer"], each["metric"]): each for each in document["results"]}
    metrics = [("boolq", "acc"), ("boolq", "acc_norm"), ("text", "perplexity")]
    assert {*found} == {(task, exit_layer, metric) for task, metric in metrics for exit_layer in (2, 4)}
    assert found["boolq", 4, "acc"]["num_examples"] == 6
    with (here / "r.csv").open() as file:
        assert len([*csv.DictReader(file)]) == len(found)
    assert (here / "r.png").stat().st_size > 1000

    plain = AutoModelForCausalLM.from_pretrained(model).eval()
    assert found["text", 4, "perplexity"]["score"] == pytest.approx(_perplexity(plain, here / "emma.txt"), rel=1e-4)


def _perplexity(plain, file):
    """The perplexity of a text by transformers, in windows of 24 tokens."""
    tokenizer, losses = byte_level(), []
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(file.read_text())["input_ids"]]])
    for start in range(0, ids.shape[1] - 1, 24):
        window = ids[:, start : start + 25]
        with torch.no_grad():
            logs = plain(window).logits[0, :-1].float().log_softmax(-1)
        losses += (-logs.gather(1, window[0, 1:, None])[:, 0]).tolist()
    return torch.tensor(losses).mean().exp().item()


def test_scores_of_rounded_weights_are_theirs(monkeypatch, here, capsys):
    model = str(save_model(here / "model", init_scale=15.0))  # so that rounding shows
    rounded = ["--quantization", "int4", "--dtype", "bfloat16"]
    assert _evaluate(monkeypatch, model, *rounded, tasks="[text=emma.txt]") == 0
    document = json.loads((here / "r.json").read_text())
    assert document["environment"]["dtype"] == document["settings"]["dtype"] == "int4 weights in bfloat16"
    (own,) = (each["score"] for each in document["results"] if each["exit_layer"] == 4)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    unrounded = _perplexity(plain, here / "emma.txt")
    round_weights([plain], "int4")
    assert own == pytest.approx(_perplexity(plain, here / "emma.txt"), rel=0.05)
    assert own != pytest.approx(unrounded, rel=0.1)


def _killed(arguments):
    """Write half of the line of the fourth example, and die."""
    written, write = [], Journal._write

    def broken(self, content):
        written.append(content)
        if len(written) == 5:  # the settings are a line, too
            self._file.write(json.dumps(content)[:30].encode())
            self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, content)

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Journal, "_write", broken)
        _evaluate(patched, *arguments)


def test_a_killed_run_goes_on_where_it_was_and_ends_as_if_it_had_not_been(monkeypatch, model, here, capsys):
    child = get_context("fork").Process(target=_killed, args=([model, "--batch_size", "2"],))
    child.start()
    child.join(240)
    assert child.exitcode == -signal.SIGKILL
    assert not (here / "r.json").exists()
    scored, score = [], likelihood_tasks.log_probabilities
    monkeypatch.setattr(likelihood_tasks, "log_probabilities", lambda *args: scored.extend(args[1]) or score(*args))
    capsys.readouterr()
    assert _evaluate(monkeypatch, model, tasks="[boolq=boolq.jsonl, text=emma.txt]") == 0
    told = capsys.readouterr().err
    assert "r.examples.jsonl: its last line was half-written (30 bytes), and is dropped" in told
    assert "going on behind 3 examples that are done" in told
    resumed = json.loads((here / "r.json").read_text())
    (here / "r.examples.jsonl").unlink()
    num_resumed = len(scored)
    assert _evaluate(monkeypatch, model) == 2  # whether r.json is of the same settings is not known any more
    assert "allowed a new file; --overwrite true replaces r.json, r.csv, r.png" in capsys.readouterr().err
    assert _evaluate(monkeypatch, model, "--overwrite", "true") == 0
    assert len(scored) == 2 * num_resumed + 3
    fresh = json.loads((here / "r.json").read_text())
    assert [each | {"score": 0, "standard_error": 0} for each in resumed["results"]] == [
        each | {"score": 0, "standard_error": 0} for each in fresh["results"]
    ]
    for own, other in zip(resumed["results"], fresh["results"], strict=True):
        assert own["score"] == pytest.approx(other["score"], rel=1e-5)

    assert _evaluate(monkeypatch, model) == 0  # all is done: nothing is scored again
    assert len(scored) == 2 * num_resumed + 3
    assert _evaluate(monkeypatch, model, "--limit", "2") == 2
    assert "allowed results of the same settings (limit is None there and 2 now); name another output" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": "[boolk]"}, "tasks: got 'boolk', allowed arc_challenge | arc_easy | boolq | "),
        ({"tasks": "[]"}, "tasks: got [], allowed one or several of arc_challenge | "),
        ({"tasks": "[text=a, text=b]"}, "allowed each task once; text is there twice"),
        ({"tasks": "[boolq=]"}, "tasks: got 'boolq=', allowed NAME or NAME=PATH"),
        ({"tasks": "[boolq=absent.jsonl]"}, "task boolq: absent.jsonl does not exist"),
        ({"tasks": "[piqa=boolq.jsonl]"}, "boolq.jsonl, row 1: there is no column 'sol1', only question, passage,"),
        ({"exits": "[5]"}, "exit_layers: got [5], allowed one or several of 1..4; 4 is the full model"),
        ({"extra": ["--window", "97"]}, "window: got 97, allowed 2..96, the model's context"),
        ({"extra": ["--on_long", "cut"]}, "on_long"),
        ({"extra": ["--limit", "0"]}, "limit: got 0, allowed [1, inf)"),
        ({"extra": ["--exit_thresholds", "[0.5, 1.0]"]}, "exit_thresholds: got [0.5, 1.0], allowed one or several"),
        ({"extra": ["--output", "r.txt"]}, "output: got 'r.txt', allowed a .json file"),
        ({"tasks": "[humaneval=boolq.jsonl]"}, "allow_running_programs: got False, allowed true for humaneval"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_before_anything_runs(monkeypatch, model, here, capsys, options, message):
    extra = options.pop("extra", [])
    assert _evaluate(monkeypatch, model, *extra, **options) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert not list(here.glob("r.*"))


def test_answers_at_confident_exits_have_files_of_their_own_and_run_nothing_again(monkeypatch, model, here, capsys):
    assert _evaluate(monkeypatch, model, tasks="[boolq=boolq.jsonl]") == 0
    monkeypatch.setattr(likelihood_tasks, "log_probabilities", None)  # all is known from the first run
    assert _evaluate(monkeypatch, model, "--exit_thresholds", "[0.9, 0.5]", tasks="[boolq=boolq.jsonl]") == 0
    said = capsys.readouterr().out
    assert "answers at the first exit that is sure enough (lossy)" in said
    assert "with thresholds: table: r.thresholds.csv, figure: r.thresholds.png" in said
    found = json.loads((here / "r.json").read_text())["confident_exits"]
    assert [(each["way"], each["exit_layer"], each["threshold"]) for each in found] == [
        ("exit", 2, None), ("exit", 4, None), ("threshold", None, 0.5), ("threshold", None, 0.9),
        ("held_out", None, None),
    ]  # fmt: skip
    with (here / "r.thresholds.csv").open() as file:
        assert [row["mean_blocks"] for row in csv.DictReader(file)] == [str(each["mean_blocks"]) for each in found]
    assert (here / "r.thresholds.png").stat().st_size > 1000
    results = json.loads((here / "r.json").read_text())["results"]
    (full,) = [each["score"] for each in results if each["exit_layer"] == 4 and each["metric"] == "acc"]
    assert found[1]["score"] == full


def test_prompts_that_are_cut_or_skipped_are_told(monkeypatch, model, here, capsys):
    long = {"question": "q", "passage": "世界" * 60, "answer": True}
    with (here / "boolq.jsonl").open("a") as file:
        file.write(json.dumps(long) + "\n")
    assert _evaluate(monkeypatch, model, tasks="[boolq=boolq.jsonl]") == 0
    assert "note: boolq: 1 prompt lost its beginning, to fit the model's context" in capsys.readouterr().out
    assert _evaluate(monkeypatch, model, "--on_long", "skip", "--output", "s.json", tasks="[boolq=boolq.jsonl]") == 0
    assert "note: boolq: 1 row skipped, longer than the model's context" in capsys.readouterr().out
    assert _evaluate(monkeypatch, model, "--on_long", "error", "--output", "e.json", tasks="[boolq=boolq.jsonl]") == 2
    assert "boolq.jsonl, row 7: got a prompt of" in capsys.readouterr().err
    (here / "boolq.jsonl").write_text(json.dumps(long) + "\n")
    assert _evaluate(monkeypatch, model, "--on_long", "skip", "--output", "n.json", tasks="[boolq=boolq.jsonl]") == 2
    assert "tasks: no row fits the model's context of" in capsys.readouterr().err
    assert not (here / "n.json").exists()
