import logging
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from app.decoding.sampling import SamplingSettings, draw, probabilities
from app.errors import ConfigError
from tests.support.slow_twins import probs_by_sorting


def _logits(rows: int, vocab: int, *, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def _grid(**values: list[Any]) -> Iterator[dict[str, Any]]:
    """Every combination of the values."""
    return (dict(zip(values, chosen, strict=True)) for chosen in product(*values.values()))


def test_probabilities_equal_a_plain_python_reference() -> None:
    logits = _logits(5, 11)
    for chosen in _grid(
        temperature=[0.3, 1.0, 2.5], top_k=[None, 1, 3, 100], top_p=[1.0, 0.9, 0.5, 0.01], min_p=[0.0, 0.02, 0.3, 1.0]
    ):
        expected = [probs_by_sorting(row, **chosen) for row in logits.tolist()]
        ours = probabilities(logits, settings=SamplingSettings(**chosen))
        torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64))


def _by_transformers(logits: Tensor, *, temperature: float, top_k: int | None, top_p: float, min_p: float) -> Tensor:
    """The warpers that `generate` chains for these settings, in its order."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p > 0.0:
        warpers.append(MinPLogitsWarper(min_p))
    return warpers(torch.zeros(len(logits), 1, dtype=torch.long), logits).softmax(-1)


def test_distributions_are_those_of_transformers_generate() -> None:
    logits = _logits(40, 31, seed=1).float()
    logits[:, 7] = -torch.inf  # as a processor may leave it
    for chosen in _grid(
        temperature=[0.3, 1.0, 2.5], top_k=[None, 1, 5, 100], top_p=[1.0, 0.9, 0.3], min_p=[0.0, 0.05, 1.0]
    ):
        ours = probabilities(logits, settings=SamplingSettings(**chosen))
        torch.testing.assert_close(ours, _by_transformers(logits, **chosen), rtol=1e-5, atol=1e-6)


def test_the_comparison_with_transformers_notices_min_p_before_temperature() -> None:
    logits = _logits(40, 31, seed=1).float()
    other = MinPLogitsWarper(0.05)(torch.zeros(40, 1, dtype=torch.long), logits)
    ours = probabilities(logits, settings=SamplingSettings(temperature=2.5, min_p=0.05))
    assert not torch.allclose(ours, (other / 2.5).softmax(-1), atol=1e-3)


def test_of_equally_probable_tokens_top_k_keeps_all_and_top_p_as_many_as_transformers_does() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0, 2.0]])
    for top_k, top_p in ((2, 1.0), (None, 0.4)):
        chosen = {"temperature": 1.0, "top_k": top_k, "top_p": top_p, "min_p": 0.0}
        ours = probabilities(logits, settings=SamplingSettings(**chosen))  # type: ignore[arg-type]
        theirs = _by_transformers(logits, **chosen)  # type: ignore[arg-type]
        assert int((ours > 0).sum()) == int((theirs > 0).sum()) == (4 if top_k else 2)
        torch.testing.assert_close(ours.sort().values, theirs.sort().values)


def test_top_p_keeps_no_token_more_once_the_share_is_reached_exactly() -> None:
    logits = torch.zeros(1, 4)
    chosen = {"temperature": 1.0, "top_k": None, "top_p": 0.5, "min_p": 0.0}
    ours = probabilities(logits, settings=SamplingSettings(**chosen))  # type: ignore[arg-type]
    assert int((ours > 0).sum()) == int((_by_transformers(logits, **chosen) > 0).sum()) == 2  # type: ignore[arg-type]


def test_where_transformers_distribution_is_not_a_number_ours_is_one_hot() -> None:
    logits = torch.tensor([[1.0, 90.0, -3.0]])
    chosen = {"temperature": 1e-38, "top_k": None, "top_p": 1.0, "min_p": 0.0}
    assert _by_transformers(logits, **chosen).isnan().all()  # type: ignore[arg-type]
    assert probabilities(logits, settings=SamplingSettings(temperature=1e-38)).tolist() == [[0.0, 1.0, 0.0]]


def test_the_comparison_notices_top_p_before_top_k() -> None:
    logits = torch.tensor([2.0, 1.0, 0.9, 0.8, 0.7], dtype=torch.float64)
    both = probabilities(logits, settings=SamplingSettings(temperature=1.0, top_k=2, top_p=0.7))
    only_top_p = probabilities(logits, settings=SamplingSettings(temperature=1.0, top_p=0.7))
    assert int((both > 0).sum()) == 1
    assert int((only_top_p > 0).sum()) == 3


def _by_sorting_everything(logits: Tensor, *, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """Top-k and top-p with the whole vocabulary in order, lower ids first among equally probable tokens."""
    probs = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_k is not None and top_k < probs.shape[-1]:
        probs = probs.where(probs >= probs.topk(top_k).values[..., -1:], 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    descending, order = probs.sort(stable=True, dim=-1, descending=True)
    mass_before = descending.cumsum(-1) - descending
    probs = torch.zeros_like(probs).scatter(-1, order, descending.where(mass_before < top_p, 0.0))
    return probs / probs.sum(-1, keepdim=True)


_SPREADS = {"peaked": 4.0, "nearly flat": 0.3, "flat": 0.0}


@given_settings(max_examples=120)
@given(
    vocab=st.sampled_from((1, 2, 7, 1024, 1025, 1026, 5000)),
    spreads=st.lists(st.sampled_from(sorted(_SPREADS)), min_size=1, max_size=4),
    grid=st.sampled_from((None, 1.0, 0.1)),
    top_k=st.sampled_from((None, 1, 5, 1023, 1024, 1025, 3000)),
    top_p=st.sampled_from((0.01, 0.25, 0.5, 0.9, 0.999)),
    seed=st.integers(0, 99),
)
def test_top_p_keeps_the_very_tokens_that_sorting_the_whole_vocabulary_keeps(
    vocab: int, spreads: list[str], grid: float | None, top_k: int | None, top_p: float, seed: int
) -> None:
    noise = torch.randn(len(spreads), 2, vocab, generator=torch.Generator().manual_seed(seed))
    logits = noise * torch.tensor([_SPREADS[spread] for spread in spreads])[:, None, None]
    if grid is not None:
        logits = (logits / grid).round() * grid  # many equally probable tokens
    chosen: dict[str, Any] = {"temperature": 0.8, "top_k": top_k, "top_p": top_p}
    ours = probabilities(logits, settings=SamplingSettings(**chosen))
    assert torch.equal(ours, _by_sorting_everything(logits, **chosen))


def _sorted_sizes(monkeypatch: pytest.MonkeyPatch, logits: Tensor, **chosen: Any) -> tuple[list[int], list[int]]:
    """Numbers of values that were sorted, and numbers asked of topk."""
    sizes, asked = list[int](), list[int]()
    sort, topk = Tensor.sort, Tensor.topk
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "sort", lambda self, *a, **k: sizes.append(self.numel()) or sort(self, *a, **k))
        patch.setattr(Tensor, "topk", lambda self, count: asked.append(count) or topk(self, count))
        probabilities(logits, settings=SamplingSettings(temperature=1.0, **chosen))
    return sizes, asked


def test_only_distributions_that_the_most_probable_tokens_do_not_fill_are_sorted_as_a_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peaked, flat = _logits(1, 6000)[0].float(), torch.zeros(6000)
    both = torch.stack([peaked, flat, peaked])
    assert _sorted_sizes(monkeypatch, both[[0, 2]], top_p=0.9) == ([], [1024])
    assert _sorted_sizes(monkeypatch, both, top_p=0.9) == ([6000], [1024])
    assert _sorted_sizes(monkeypatch, both[[0, 2]], top_k=50, top_p=0.99) == ([], [50, 51])
    assert _sorted_sizes(monkeypatch, both, top_k=50, top_p=0.99) == ([6000], [50, 51])  # its ties are all kept


def test_no_other_device_is_waited_for() -> None:
    logits = torch.zeros(2, 6000, device="meta")  # whose values nobody can ask for
    probabilities(logits, settings=SamplingSettings(temperature=1.0, top_k=50, top_p=0.9, min_p=0.1))


def test_a_tiny_temperature_ends_in_a_one_hot_distribution_even_in_bf16() -> None:
    logits = torch.tensor([1.0, 90.0, -3.0], dtype=torch.bfloat16)
    assert probabilities(logits, settings=SamplingSettings(temperature=1e-30)).tolist() == [0.0, 1.0, 0.0]


def test_a_distribution_does_not_depend_on_what_else_is_in_the_tensor() -> None:
    logits = _logits(6, 31).float()
    settings = SamplingSettings(temperature=0.7, top_k=9, top_p=0.9, min_p=0.05)
    together = probabilities(logits.view(2, 3, 31), settings=settings).view(6, 31)
    for row in range(6):
        assert torch.equal(together[row], probabilities(logits[row], settings=settings))


def test_a_token_is_drawn_from_the_given_generator_by_the_distribution_alone() -> None:
    before = torch.get_rng_state()
    distribution = torch.tensor([0.0, 0.25, 0.0, 0.75])
    tokens = [int(draw(distribution, generator=torch.Generator().manual_seed(seed))) for seed in range(400)]
    assert set(tokens) == {1, 3}
    assert 70 < tokens.count(1) < 130  # 100 within 3.5 standard deviations
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("uniform", "expected"), [(0.0, 1), (0.25, 3), (1.0 - 2.0**-53, 3)])
def test_no_random_number_gives_a_token_of_probability_0(
    uniform: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([uniform], dtype=torch.float64))
    assert int(draw(torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0]), generator=torch.Generator())) == expected


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": 1.0, "top_k": 0},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1.0, "top_p": 1.1},
        {"temperature": 1.0, "top_p": float("nan")},
        {"temperature": 1.0, "min_p": -0.1},
        {"temperature": 1.0, "min_p": 1.1},
        {"temperature": 1.0, "min_p": float("nan")},
    ],
)
def test_a_setting_out_of_range_is_named(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"^{list(bad)[-1]}: got"):
        SamplingSettings(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("useless", [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_what_cuts_a_distribution_warns_without_temperature(
    useless: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        SamplingSettings(**useless)  # type: ignore[arg-type]
    assert "no effect" in caplog.text
