"""The affine map of the normal equations against torch's own least squares on the pairs themselves."""

import torch

from app.layerskip.least_squares import AffineFit


def test_the_map_is_that_of_torchs_least_squares_however_the_pairs_come() -> None:
    torch.manual_seed(0)
    inputs, outputs = torch.randn(200, 6) + 2.0, torch.randn(200, 6) - 1.0
    inputs[:, 2] *= 1e4  # as single channels of real states are
    fit = AffineFit(6)
    for part in (slice(0, 1), slice(1, 150), slice(150, 200)):
        fit.add(inputs[part].bfloat16(), outputs[part])
    weight, bias = fit.solve()
    known = torch.cat([inputs.bfloat16().double(), torch.ones(200, 1, dtype=torch.float64)], dim=1)
    expected = torch.linalg.lstsq(known, outputs.double()).solution
    torch.testing.assert_close(torch.cat([weight.t(), bias[None]]), expected, rtol=1e-6, atol=1e-9)


def test_fewer_pairs_than_channels_and_channels_without_a_value_give_an_exact_map() -> None:
    torch.manual_seed(0)
    inputs, outputs = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6)
    inputs[:, 4] = 0.0
    fit = AffineFit(6)
    fit.add(inputs, outputs)
    weight, bias = fit.solve()
    torch.testing.assert_close(inputs @ weight.t() + bias, outputs.double(), rtol=0, atol=1e-6)
    assert weight.abs().max() < 10
    assert not weight[:, 4].any()
