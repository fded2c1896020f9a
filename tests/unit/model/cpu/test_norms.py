"""The norm of decoding is torch's, in every type."""

import pytest
import torch
import torch.nn.functional as F

from app.model.cpu.norms import RMSNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e-4, 0.0])
def test_it_is_the_norm_of_torch(dtype: torch.dtype, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = (size * torch.randn(2, 3, 48, generator=generator)).to(dtype)
    weight = torch.randn(48, generator=generator).to(dtype)
    normed = RMSNorm(weight, 1e-6)(inputs)
    torch.testing.assert_close(normed, F.rms_norm(inputs, (48,), weight, 1e-6))


def test_a_value_that_is_far_larger_than_many_others_costs_no_digit() -> None:
    inputs, weight = torch.linspace(1, 2, 8192)[None, None], torch.ones(8192)
    inputs[..., 0] = 1e4
    exact = F.rms_norm(inputs.double(), (8192,), weight.double(), 1e-6)
    torch.testing.assert_close(RMSNorm(weight, 1e-6)(inputs).double(), exact, rtol=2e-6, atol=0)


def test_what_tensors_are_by_default_changes_nothing() -> None:
    inputs, weight = torch.ones(1, 1, 48), torch.ones(48)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            norm = RMSNorm(weight, 1e-6)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(norm(inputs), F.rms_norm(inputs, (48,), weight, 1e-6))
