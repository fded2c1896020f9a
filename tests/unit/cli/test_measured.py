import logging

import pytest
from lightning.pytorch import Trainer

from app.cli.measured import warn_of_emulation
from tests.support.processors import AVX2, fake_processor


@pytest.mark.parametrize(("precision", "said"), [("bf16-mixed", True), ("16-true", True), ("32-true", False)])
def test_training_in_what_a_processor_emulates_is_warned_of(monkeypatch, caplog, precision, said):
    fake_processor(monkeypatch, AVX2, "AVX2")
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    with caplog.at_level(logging.WARNING):
        warn_of_emulation(Trainer(accelerator="cpu", devices=1, precision=precision, **settings))
    named = f"trainer.precision {precision}: AMD EPYC emulates {'float16' if precision == '16-true' else 'bfloat16'}"
    assert (named in caplog.text) == said == bool(caplog.records)
