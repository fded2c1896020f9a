import pytest
import torch

from app.model.cpu.precision import emulated, training_precision
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
    assert bool(emulated(torch.bfloat16)) == bfloat16
    assert bool(emulated(torch.float16)) == float16
    assert emulated(torch.float32) is emulated(torch.float64) is None
    assert training_precision() == ("32-true" if bfloat16 else "bf16-mixed")
