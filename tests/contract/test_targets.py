"""`make bench`'s verb on tiny models: what it runs, what it runs again, and the file it writes."""

import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from app.cli import data_targets, targets
from tests.support.runs import cli, write_corpus
from tests.support.saved_models import save_model, write_prompts

CONFIGS = Path(__file__).parents[2] / "configs"
FIELDS = {"value", "target", "passed", "command", "environment"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Two models and prompts in the working directory; a small grid, and everything in this process."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "trained", num_layers=3)
    save_model(tmp_path / "topv2", num_layers=2)
    write_prompts(tmp_path / "prompts.jsonl", ["the end of", "then more"])
    monkeypatch.setattr(targets, "_GRID", {"exit_layers": [1, 2], "num_draft_tokens": [1, 2]})
    monkeypatch.setattr(targets, "_SETTINGS", ("--max_new_tokens", "6", "--ignore_eos", "true"))
    monkeypatch.setattr(targets, "_write_prompts", lambda path, config: tmp_path / "prompts.jsonl")
    monkeypatch.setattr(targets, "_pretrained_model", lambda: None)
    monkeypatch.setattr(targets, "measure_data_targets", lambda folder, config: {})
    monkeypatch.setattr(targets, "measure_training_targets", dict)
    return tmp_path


@pytest.fixture
def commands(monkeypatch):
    """What would have been run in processes of their own."""
    seen = []

    def run(arguments, *, check):
        assert arguments[:3] == [sys.executable, "-m", "app"]
        assert not check
        seen.append(arguments[3:])
        return SimpleNamespace(returncode=cli(monkeypatch, *arguments[3:]))

    monkeypatch.setattr(targets, "subprocess", SimpleNamespace(run=run))
    return seen


def _bench(monkeypatch, *options):
    return cli(monkeypatch, "targets", "--trained_model", "trained", "--output", "build/bench.json", *options)


def test_what_won_is_measured_again_and_only_that_is_reported(here, monkeypatch, commands, capsys):
    assert _bench(monkeypatch, "--topv2_model", "topv2", "--topv2_prompts", "prompts.jsonl") == 0
    sweep, again, topv2 = commands
    grid, confirmed = (
        json.loads((here / f"build/{name}.json").read_text()) for name in ("trained", "trained-confirmed")
    )
    assert len(grid["results"]) == 1 + 4 + 4
    fastest = max(
        (r for r in grid["results"] if r["strategy"] == "self_speculative"), key=lambda r: r["tokens_per_second"]
    )
    assert f"--exit_layers=[{fastest['exit_layer']}]" in again
    assert again[again.index("--repeats") + 1] == "5"
    assert sweep[sweep.index("--repeats") + 1] == "3"
    bench = json.loads((here / "build/bench.json").read_text())
    assert set(bench) == {
        "self_speculative_speedup", "speedup_prediction_error", "vs_transformers_early_exit",
        "decode_vs_transformers_topv2",
    }  # fmt: skip
    for result in bench.values():
        assert set(result) == FIELDS
    chosen = next(
        r for r in confirmed["results"]
        if (r["strategy"], r["num_draft_tokens"]) == ("self_speculative", fastest["num_draft_tokens"])
    )  # fmt: skip
    speedup = bench["self_speculative_speedup"]
    assert speedup["value"] == pytest.approx(chosen["speedup"])
    assert speedup["passed"] == (speedup["value"] >= 2.0)
    assert shlex.split(speedup["command"]) == ["layerskip", *again]
    assert shlex.split(bench["decode_vs_transformers_topv2"]["command"]) == ["layerskip", *topv2]
    out = capsys.readouterr().out
    assert "speedup_prediction_error: " in out
    assert "target at most 0.15" in out


def test_without_other_models_only_the_trained_ones_targets_are_there(here, monkeypatch, commands):
    assert _bench(monkeypatch) == 0
    assert len(commands) == 2
    assert not {"decode_vs_transformers", "decode_vs_transformers_topv2"} & set(
        json.loads((here / "build/bench.json").read_text())
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trained_model", "absent"], "trained_model: got 'absent', allowed an existing model"),
        (["--topv2_model", "absent", "--topv2_prompts", "prompts.jsonl"], "topv2_model: got 'absent'"),
        (["--topv2_model", "topv2"], "topv2_prompts: got None"),
        (["--topv2_prompts", "prompts.jsonl"], "topv2_prompts: got 'prompts.jsonl'"),
    ],
)
def test_a_mistake_ends_with_status_2_before_anything_runs(here, monkeypatch, commands, capsys, options, message):
    assert _bench(monkeypatch, *options) == 2
    assert message in capsys.readouterr().err
    assert commands == []


def test_a_benchmark_that_fails_ends_it_with_its_status(here, monkeypatch, commands):
    (here / "prompts.jsonl").write_text("{")
    assert _bench(monkeypatch) == 2
    assert not (here / "build/bench.json").exists()


def test_data_targets_come_from_a_stream_and_a_training_run(tmp_path, monkeypatch, capsys):
    def run_here(*arguments):
        capsys.readouterr()
        assert cli(monkeypatch, *arguments) == 0
        return shlex.join(["layerskip", *arguments]), capsys.readouterr().out

    monkeypatch.setattr(data_targets, "run_verb", run_here)
    corpus = write_corpus(tmp_path / "corpus", files=40)
    config = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    config["data"]["init_args"] |= {"sources": {"code": {"kind": "files", "path": str(corpus)}}}
    config["data"]["init_args"]["cache_dir"] = str(tmp_path / "cache")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    tiny = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 8, "num_attention_heads": 2}
    monkeypatch.setattr(data_targets, "_MODEL", tiny | {"num_key_value_heads": 2, "vocab_size": 300})
    monkeypatch.setattr(data_targets, "_BEFORE_RESUMING", 20_000)
    measured = data_targets.measure_data_targets(tmp_path / "build", config=str(tmp_path / "config.yaml"))
    assert {name: set(result) for name, result in measured.items()} == {
        "data_rate_ratio": FIELDS,
        "resume_seconds": FIELDS,
    }
    assert measured["data_rate_ratio"]["value"] > 0
    assert measured["resume_seconds"]["passed"] == (measured["resume_seconds"]["value"] <= 5.0)
    assert not list((tmp_path / "build").iterdir())
