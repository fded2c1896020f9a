from __future__ import annotations

import logging

import pytest
import torch

from app.decoding.sampling import SamplingSettings, probabilities
from app.errors import ConfigError
from tests.support.slow_twins import law_by_sorting


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 3, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.01])
def test_probabilities_equal_a_plain_python_reference(temperature: float, top_k: int | None, top_p: float) -> None:
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    settings = SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p)
    expected = [law_by_sorting(row, temperature=temperature, top_k=top_k, top_p=top_p) for row in logits.tolist()]
    torch.testing.assert_close(probabilities(logits, settings=settings), torch.tensor(expected, dtype=torch.float64))


def test_the_comparison_notices_top_p_before_top_k() -> None:
    logits = torch.tensor([2.0, 1.0, 0.9, 0.8, 0.7], dtype=torch.float64)
    both = probabilities(logits, settings=SamplingSettings(temperature=1.0, top_k=2, top_p=0.7))
    only_top_p = probabilities(logits, settings=SamplingSettings(temperature=1.0, top_p=0.7))
    assert int((both > 0).sum()) == 1
    assert int((only_top_p > 0).sum()) == 3


def test_a_tiny_temperature_ends_in_a_one_hot_law_even_in_bf16() -> None:
    logits = torch.tensor([1.0, 90.0, -3.0], dtype=torch.bfloat16)
    assert probabilities(logits, settings=SamplingSettings(temperature=1e-30)).tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": 1.0, "top_k": 0},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1.0, "top_p": 1.1},
    ],
)
def test_a_setting_out_of_range_is_named(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"^{list(bad)[-1]}: got"):
        SamplingSettings(**bad)  # type: ignore[arg-type]


def test_top_k_without_temperature_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        SamplingSettings(top_k=5)
    assert "no effect" in caplog.text
