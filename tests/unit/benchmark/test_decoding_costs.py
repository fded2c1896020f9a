from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from app.benchmark import decoding_costs
from app.benchmark.decoding_costs import (
    DecodingCosts,
    costs_line,
    fit_decoding_costs,
    measure_decoding_costs,
    median_costs,
)
from app.decoding.cost_model import CostModel
from app.errors import ConfigError
from app.spans.decoder import SpanDecoder
from tests.support.fake_decoder import FakeCache, FakeDecoder
from tests.support.tiny_models import tiny_llama

_BLOCK, _HEAD, _DRAFT_HEAD, _SEVERAL, _EXTRA, _OVERHEAD = 0.25, 3.0, 1.25, 0.2, 0.04, 1.5  # seconds, blocks, shares
_COSTS = (_BLOCK, _HEAD, _DRAFT_HEAD, _SEVERAL, _EXTRA, _OVERHEAD)


class CostlyDecoder(FakeDecoder):
    """Counts up every token; using a part moves `now` by what that part costs."""

    num_layers = 16  # drafts come from exits 2 and 4, plain steps after 1 and 16 blocks

    def __init__(self, *, max_length: int = 512, hiccup: Callable[[int], float] = lambda _: 0.0) -> None:
        logits = torch.eye(50).roll(1, dims=1)
        super().__init__(logits, logits, max_length=max_length)
        self.now, self.calls, self.longest, self._hiccup = 0.0, 0, 0, hiccup

    def clock(self) -> float:
        return self.now

    def _spend(self, blocks: float, positions: int) -> None:
        self.calls += 1
        self.longest = max(self.longest, positions)
        further = _SEVERAL * (positions > 1) + _EXTRA * (positions - 1)
        self.now += _BLOCK * blocks * (1 + further) + self._hiccup(self.calls)

    def run_blocks(self, hidden_BTD: Tensor, *, start: int, stop: int, cache: FakeCache) -> Tensor:
        self._spend(stop - start, hidden_BTD.shape[1])
        if 0 < start < self.num_layers:  # only verification starts in the middle
            self._spend(_OVERHEAD, 1)
        return super().run_blocks(hidden_BTD, start=start, stop=stop, cache=cache)

    def unembed(self, hidden_BTD: Tensor, *, exit_layer: int | None = None) -> Tensor:
        blocks_run = hidden_BTD[0, 0, 1]
        self._spend(_DRAFT_HEAD if blocks_run < 0 or 1 < blocks_run < self.num_layers else _HEAD, hidden_BTD.shape[1])
        return super().unembed(hidden_BTD, exit_layer=exit_layer)


def _as_tuple(costs: DecodingCosts) -> tuple[float, ...]:
    return tuple(getattr(costs, field.name) for field in fields(DecodingCosts))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_known_costs_are_recovered_exactly(batch_size: int) -> None:
    decoder = CostlyDecoder()
    costs = measure_decoding_costs(decoder, batch_size=batch_size, clock=decoder.clock)
    assert _as_tuple(costs) == pytest.approx(_COSTS)


def test_a_machine_that_pauses_now_and_then_does_not_move_the_medians() -> None:
    decoder = CostlyDecoder(hiccup=lambda call: 1000.0 * (call % 97 == 0))
    costs = measure_decoding_costs(decoder, repeats=9, clock=decoder.clock)
    assert _as_tuple(costs) == pytest.approx(_COSTS)
    slower = CostlyDecoder(hiccup=lambda _: 0.1)  # every part: this one must show
    assert measure_decoding_costs(slower, clock=slower.clock).head > 1.05 * _HEAD


def test_the_first_round_of_measurements_does_not_count() -> None:
    warm_up = CostlyDecoder()
    measure_decoding_costs(warm_up, repeats=1, clock=warm_up.clock)
    first_half = warm_up.calls // 2
    decoder = CostlyDecoder(hiccup=lambda call: 5.0 * (call <= first_half))
    costs = measure_decoding_costs(decoder, repeats=1, clock=decoder.clock)
    assert _as_tuple(costs) == pytest.approx(_COSTS)


def test_passes_are_measured_at_the_context_asked_for_or_as_far_as_the_model_goes() -> None:
    for max_length, expected in ((512, 128), (64, 47)):
        decoder = CostlyDecoder(max_length=max_length)
        measure_decoding_costs(decoder, repeats=1, clock=decoder.clock)
        assert decoder.longest == expected


def test_costs_are_never_negative_whatever_the_noise() -> None:
    steps, passes = {1: 2.0, 6: 3.0}, {1: 3.0, 2: 2.5, 3: 2.0}
    costs = fit_decoding_costs(steps, passes, {2: 0.25}, {(2, 4): 1.0, (2, 8): 1.1}, head_by_size=2.0)
    assert _as_tuple(costs)[2:] == (costs.head, 0.0, 0.0, 0.0)  # a draft runs that head, too
    assert costs.head == 9.0
    nonsense = fit_decoding_costs({1: 5.0, 6: 4.0}, passes, {2: 0.25}, {(2, 4): 1.0, (2, 8): 1.1}, head_by_size=2.0)
    assert (nonsense.block_seconds, nonsense.head) == pytest.approx((0.5, 2.0))
    headless = fit_decoding_costs({1: 0.1, 6: 3.0}, passes, {2: 0.25}, {(2, 4): 1.0, (2, 8): 1.1}, head_by_size=2.0)
    assert (headless.block_seconds, headless.head) == (0.5, 0.0)


def test_a_cost_that_was_clipped_is_called_too_small_to_measure_and_not_free() -> None:
    clipped = fit_decoding_costs(
        {1: 0.1, 6: 3.0}, {1: 3.0, 2: 2.5, 3: 2.0}, {2: 0.25}, {(2, 4): 1.0, (2, 8): 1.1}, head_by_size=2.0
    )
    assert costs_line(clipped).count("too small to measure") == 5
    assert "0.0" not in costs_line(clipped)
    costs = DecodingCosts(
        block_seconds=1e-4, head=1.5, draft_head=0.5, first_extra=0.2, extra_token=0.04, overhead=0.25
    )
    assert costs_line(costs) == (
        "a block takes 100 us at one token; in blocks: the rest of a step (H) 1.50, of a draft (H_d) 0.50, a round's"
        " overhead 0.25; several positions add to a pass (j) 20.0% of it, each of them (k) 4.0%"
    )


def test_a_draft_whose_head_seems_free_costs_the_share_of_the_head_that_it_uses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder, shares = CostlyDecoder(), list[float]()
    monkeypatch.setattr(CostlyDecoder, "draft_head_size", decoder.head_size // 4)

    def fit(_: object, passes: dict[int, float], *__: object, draft_share: float, **others: Any) -> DecodingCosts:
        shares.append(draft_share)
        rounds = {(2, 4): 1.0, (2, 8): 1.1}
        return fit_decoding_costs({1: 1.0, 6: 3.0}, passes, {2: 0.7}, rounds, draft_share=draft_share, **others)

    monkeypatch.setattr(decoding_costs, "fit_decoding_costs", fit)
    costs = measure_decoding_costs(decoder, clock=decoder.clock)
    assert (costs.head, costs.draft_head, shares) == (pytest.approx(1.5), pytest.approx(1.5 / 4), [0.25])


@pytest.mark.parametrize(
    ("passes", "line"),
    [
        ({1: 2.0, 2: 2.6, 3: 2.8, 4: 3.0}, (0.2, 0.1)),
        ({1: 2.0, 2: 2.0, 3: 2.4, 4: 2.8}, (0.0, 1.6 / 14)),  # would start below 0
        ({1: 2.0, 2: 2.8, 3: 2.6, 4: 2.4}, (0.3, 0.0)),  # would fall
    ],
)
def test_passes_over_several_positions_lie_on_a_line_that_neither_starts_below_one_nor_falls(
    passes: dict[int, float], line: tuple[float, float]
) -> None:
    costs = fit_decoding_costs({1: 1.0, 6: 3.0}, passes, {2: 1.0}, {(2, 4): 1.0, (2, 8): 1.1}, head_by_size=2.0)
    assert (costs.first_extra, costs.extra_token) == pytest.approx(line)


@pytest.mark.parametrize("longer", [0.9, 1.1, 4.0])
def test_noise_of_rounds_does_not_move_what_a_draft_costs(longer: float) -> None:
    passes = {1: 3.0, 2: 3.1, 3: 3.2}
    costs = fit_decoding_costs(
        {1: 0.5, 6: 3.0}, passes, {2: 1.75}, {(2, 1): 1.0, (2, 2): longer}, head_by_size=2.0, num_exit_blocks={2: 1.25}
    )
    assert costs.draft_head == pytest.approx(1.75 / costs.block_seconds - 2 - 1.25)


def test_the_median_of_costs_is_of_each_figure() -> None:
    figures = [(1.0, 9.0, 2.0, 0.1, 0.3, 0.0), (3.0, 1.0, 7.0, 0.0, 0.9, 0.5), (2.0, 2.0, 1.0, 0.9, 0.2, 9.0)]
    names = [field.name for field in fields(DecodingCosts)]
    costs = [DecodingCosts(**dict(zip(names, each, strict=True))) for each in figures]
    assert _as_tuple(median_costs(costs)) == (2.0, 2.0, 2.0, 0.1, 0.3, 0.5)


def test_the_cost_model_is_that_of_self_speculation_with_these_figures() -> None:
    costs = DecodingCosts(**dict(zip([field.name for field in fields(DecodingCosts)], _COSTS, strict=True)))
    figures = {field.name: getattr(costs, field.name) for field in fields(DecodingCosts)[1:]}
    assert costs.cost_model(num_layers=6, exit_layer=2) == CostModel.self_speculative(
        num_layers=6, exit_layer=2, **figures
    )


def test_a_real_decoder_costs_something_and_is_left_as_it_was() -> None:
    model = tiny_llama(num_layers=3, tied=False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    costs = measure_decoding_costs(SpanDecoder(model), batch_size=2, context_length=16, max_positions=4, repeats=2)
    assert costs.block_seconds > 0.0
    assert min(costs.head, costs.extra_token, costs.overhead) >= 0.0
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("max_positions", [2, 300])
def test_what_cannot_be_measured_is_refused_before_anything_runs(max_positions: int) -> None:
    decoder = CostlyDecoder()
    with pytest.raises(ConfigError, match="max_positions"):
        measure_decoding_costs(decoder, clock=decoder.clock, max_positions=max_positions)
    assert not decoder.calls


def test_a_model_of_one_block_has_no_exit() -> None:
    with pytest.raises(ConfigError, match="model: got 'one block', allowed at least two"):
        measure_decoding_costs(SpanDecoder(tiny_llama(num_layers=1)))


def test_blocks_of_an_exits_own_are_no_part_of_the_drafts_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CostlyDecoder, "own_exit", 3)
    monkeypatch.setattr(CostlyDecoder, "num_own", 2)
    decoder = CostlyDecoder()
    costs = measure_decoding_costs(decoder, clock=decoder.clock)
    assert costs.draft_head == pytest.approx(_DRAFT_HEAD)
    model = costs.cost_model(num_layers=16, exit_layer=3, num_exit_blocks=2)
    assert model.draft_step == pytest.approx(3 + 2 + _DRAFT_HEAD)
