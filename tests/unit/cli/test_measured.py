import logging

import pytest
import torch
from lightning.pytorch import Trainer

from app.cli.measured import warn_of_emulation
from app.model.cpu.precision import emulated, fast_dtype, training_precision
from tests.support.processors import ARM, AVX2, AVX512_BF16, fake_processor


@pytest.mark.parametrize(
    ("capabilities", "kernels", "bfloat16", "float16"),
    [
        (AVX2, "AVX2", True, True),
        (AVX512_BF16, "AVX512", False, True),
        (AVX512_BF16, "AVX2", True, True),  # asked for by ATEN_CPU_CAPABILITY
        (ARM, "DEFAULT", False, False),
    ],
)
def test_a_processor_is_fast_in_what_it_has_units_and_kernels_for(
    monkeypatch, capabilities, kernels, bfloat16, float16
):
    fake_processor(monkeypatch, capabilities, kernels)
    assert bool(emulated(torch.bfloat16)) == bfloat16 == (fast_dtype() == torch.float32)
    assert bool(emulated(torch.float16)) == float16
    assert emulated(torch.float32) is emulated(torch.float64) is None
    assert training_precision() == ("32-true" if bfloat16 else "bf16-mixed")


@pytest.mark.parametrize(("precision", "said"), [("bf16-mixed", True), ("16-true", True), ("32-true", False)])
def test_training_in_what_a_processor_emulates_is_warned_of(monkeypatch, caplog, precision, said):
    fake_processor(monkeypatch, AVX2, "AVX2")
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    with caplog.at_level(logging.WARNING):
        warn_of_emulation(Trainer(accelerator="cpu", devices=1, precision=precision, **settings))
    named = f"trainer.precision {precision}: AMD EPYC emulates {'float16' if precision == '16-true' else 'bfloat16'}"
    assert (named in caplog.text) == said == bool(caplog.records)
