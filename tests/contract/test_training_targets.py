"""`python -m app.cli.training_targets` on tiny models."""

import json
import sys

import pytest

from app.cli import training_targets
from tests.support.tiny_models import tiny_config


@pytest.fixture
def tiny(monkeypatch):
    shape = tiny_config(num_layers=4, vocab_size=50, max_length=256)
    wide = tiny_config(num_layers=30, vocab_size=50, max_length=256)
    monkeypatch.setattr(training_targets, "_PAPER", shape)
    monkeypatch.setattr(training_targets, "_SMOLLM2", wide)
    monkeypatch.setattr(training_targets, "_LOSS_SHAPE", {"num_tokens": 8, "vocab_size": 50, "width": 8})


def test_every_target_is_measured_written_and_told(tiny, tmp_path, monkeypatch, capsys):
    peaks = {1: 100.0, 8: 110.0}
    monkeypatch.setattr(
        training_targets, "peak_memory", lambda _, what, *args, num_threads: peaks.get(what, 2.0**20 * num_threads)
    )
    output = tmp_path / "new" / "bench.json"
    monkeypatch.setattr(sys, "argv", ["training_targets", "--repeats", "1", "--output", str(output)])
    training_targets.run()
    measured = json.loads(output.read_text())
    assert set(measured) == {"step_overhead", "step_overhead_wide_vocabulary", "dropout_saving", "loss_memory_ratio"}
    assert measured["loss_memory_ratio"]["value"] == pytest.approx(1.1)
    assert measured["loss_memory_ratio"]["passed"]
    told = capsys.readouterr().out
    assert "loss_memory_ratio: 1.100, target at most 1.15: passed" in told
    assert "dropout_saving: " in told
    assert "target at least 0.70" in told
    assert "recipe, logits stacked" in told


def test_ratios_are_of_what_was_measured_next_to_each_other():
    assert training_targets.ratio([2.0, 40.0, 9.0], [1.0, 10.0, 3.0]) == 3.0
