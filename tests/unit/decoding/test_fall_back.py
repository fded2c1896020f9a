"""Giving up drafts in the engine, under a clock that shows what the fake decoders' work costs."""

from typing import Any

import pytest
import torch

from app.decoding.cost_model import CostModel
from app.decoding.draft_policy import DraftPolicy
from app.decoding.engine import decode_batch
from app.decoding.result import DecodingResult
from app.decoding.sampling import SamplingSettings
from app.decoding.settings import DecodingSettings
from tests.support.decoding import decode
from tests.support.fake_decoder import FakeDecoder, counting_decoder
from tests.unit.decoding.circumstances import HostileClock

_ALL = tuple(range(90))
_NEEDS: dict[str, dict[str, Any]] = {
    "self_speculative": {"exit_layer": 1},
    "draft_model": {},
    "layer_skip": {"skipped_layers": (1, 2)},
}
_GREEDY, _SAMPLED = SamplingSettings(), SamplingSettings(temperature=1e-9)


def _run(
    strategy: Any, *, misses: tuple[int, ...], budget: int = 80, sampling: SamplingSettings = _GREEDY, **settings: Any
) -> DecodingResult:
    decoder = counting_decoder(misses=misses, vocab_size=100, max_length=100)
    small = counting_decoder(vocab_size=100, max_length=100)
    small.full_logits = decoder.exit_logits
    small.block_size, small.head_size = 10, 10  # a tenth of the time
    needs = _NEEDS[strategy] | ({"draft_decoder": small} if strategy == "draft_model" else {})
    decoder.may_skip = strategy == "layer_skip"
    chosen = DecodingSettings(
        **(
            {"max_new_tokens": budget, "num_draft_tokens": 4, "fall_back": True, "sampling": sampling}
            | needs
            | settings
        )
    )
    generator = None if sampling.greedy else torch.Generator().manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("app.decoding.engine.perf_counter", lambda: decoder.elapsed + small.elapsed / 10)
        result = decode(decoder, [0], strategy=strategy, settings=chosen, generator=generator)
    assert result.tokens == list(range(1, budget + 1))
    return result


@pytest.mark.parametrize("sampling", [_GREEDY, _SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("strategy", _NEEDS)
def test_drafts_that_are_never_kept_are_given_up_and_nothing_is_drafted_afterwards(
    strategy: str, sampling: SamplingSettings
) -> None:
    result = _run(strategy, misses=_ALL, sampling=sampling)
    assert result.fell_back_after is not None
    assert 9 <= result.fell_back_after <= 12  # after eight rounds of one token, and a few plain ones
    rounds = result.fell_back_after - 1
    assert all(step.drafted == 0 for step in result.steps[rounds:])
    assert sum(step.drafted > 0 for step in result.steps) == 8


def test_an_exits_own_blocks_see_nothing_once_its_drafts_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeDecoder, "own_exit", 1)
    monkeypatch.setattr(FakeDecoder, "num_own", 2)
    decoder = counting_decoder(misses=_ALL, vocab_size=100, max_length=100)
    monkeypatch.setattr("app.decoding.engine.perf_counter", lambda: decoder.elapsed)
    settings = DecodingSettings(max_new_tokens=30, exit_layer=1, num_draft_tokens=4, fall_back=True)
    result = decode(decoder, [0], strategy="self_speculative", settings=settings)
    assert result.fell_back_after is not None
    plain = [(0, 1, 1), (1, 4, 1)] * (30 - result.fell_back_after)
    assert decoder.spans[-len(plain) :] == plain


@pytest.mark.parametrize("sampling", [_GREEDY, _SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("strategy", _NEEDS)
def test_drafts_that_pay_are_not_given_up(strategy: str, sampling: SamplingSettings) -> None:
    result = _run(strategy, misses=_ALL[::20], sampling=sampling)
    assert result.fell_back_after is None
    assert sum(step.drafted == 0 for step in result.steps) <= 4  # plain rounds to time, and one at the end


def test_text_that_becomes_hard_is_given_up_later() -> None:
    result = _run("self_speculative", misses=_ALL[40:])
    assert result.fell_back_after is not None
    assert 45 <= result.fell_back_after < 70


def test_nothing_is_given_up_unless_asked_for() -> None:
    result = _run("self_speculative", misses=_ALL, fall_back=False)
    assert result.fell_back_after is None
    assert all(step.drafted for step in result.steps[:-4])


def test_when_sampling_the_given_costs_decide_whatever_the_clock_shows() -> None:
    free = CostModel(plain_step=5.0, draft_step=0.0, draft_tail=0.0, verify=5.0, extra_token=0.0)
    dear = CostModel(plain_step=5.0, draft_step=50.0, draft_tail=0.0, verify=5.0, extra_token=0.0)
    assert _run("self_speculative", misses=_ALL, sampling=_SAMPLED, costs=free).fell_back_after is None
    assert _run("self_speculative", misses=(), sampling=_SAMPLED, costs=dear).fell_back_after is not None
    assert _run("self_speculative", misses=(), costs=dear).fell_back_after is None  # greedy goes by the clock


def _batch(decoder: FakeDecoder, sampling: SamplingSettings) -> list[DecodingResult]:
    settings = DecodingSettings(
        max_new_tokens=30, exit_layer=1, num_draft_tokens=4, fall_back=True, eos_token_ids=(55,), sampling=sampling
    )
    generators = None if sampling.greedy else [torch.Generator().manual_seed(seed) for seed in range(3)]
    return decode_batch(
        decoder, [[0], [52], [60]], strategy="self_speculative", settings=settings, generators=generators
    )


def _misses_below_50() -> FakeDecoder:
    return counting_decoder(misses=_ALL[:50], vocab_size=100, max_length=100)


def test_a_greedy_batch_has_one_judgement_which_rows_that_had_left_do_not_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("app.decoding.engine.perf_counter", HostileClock([1.0]))  # each draft step costs a round
    hard, ended, easy = _batch(counting_decoder(misses=_ALL, vocab_size=100, max_length=100), _GREEDY)
    assert (ended.tokens, ended.fell_back_after) == ([53, 54, 55], None)
    for result in (hard, easy):
        assert result.fell_back_after == 9  # eight rounds of one token
        assert [step.drafted for step in result.steps] == [4] * 8 + [0] * 21


def test_in_a_sampled_batch_every_row_is_judged_for_itself() -> None:
    hard, _, easy = _batch(_misses_below_50(), _SAMPLED)
    assert hard.fell_back_after == 9
    assert easy.fell_back_after is None
    assert [step.drafted for step in easy.steps] == [4] * 5 + [3]
    assert [step.drafted for step in hard.steps] == [4] * 8 + [0] * 21


def _looping(misses: tuple[int, ...], *, budget: int, strategy: Any = "self_speculative") -> DecodingResult:
    """0 to 19 again and again, so that from the second time on n-grams draft all of it; `misses` are the exit's."""
    decoder = counting_decoder(misses=misses, vocab_size=100, max_length=400)
    decoder.full_logits[19] = decoder.full_logits[99]  # 0 follows
    needs = {"exit_layer": 1, "num_draft_tokens": 4} if strategy == "self_speculative" else {}
    settings = DecodingSettings(max_new_tokens=budget, n_gram_match=3, n_gram_max_drafts=4, fall_back=True, **needs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("app.decoding.engine.perf_counter", lambda: decoder.elapsed)
        result = decode(decoder, [0], strategy=strategy, settings=settings)
    assert result.tokens == [token % 20 for token in range(1, budget + 1)]
    return result


def test_n_grams_do_not_hide_that_the_drafter_never_pays_and_go_on_after_it() -> None:
    result = _looping(_ALL, budget=200)
    assert result.fell_back_after is not None
    assert 9 <= result.fell_back_after <= 12
    assert sum(step.drafted > 0 and not step.by_n_gram for step in result.steps) == 8
    assert result.steps[-2].by_n_gram
    assert result.accepted_by_n_gram == result.drafted_by_n_gram > 100


def test_a_policy_hears_only_of_what_the_drafter_drafted(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[int, int]] = []
    observe = DraftPolicy.observe
    monkeypatch.setattr(
        DraftPolicy, "observe", lambda self, **told: heard.append(tuple(told.values())) or observe(self, **told)
    )
    result = _looping((), budget=60)
    assert heard == [(step.drafted, step.accepted) for step in result.steps if not step.by_n_gram]
    assert 0 < len(heard) < len(result.steps)


def test_rows_of_n_grams_do_not_hide_that_the_drafter_of_the_others_never_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = counting_decoder(misses=_ALL, vocab_size=100, max_length=400)
    decoder.full_logits[19] = decoder.full_logits[99]  # 0 follows
    monkeypatch.setattr("app.decoding.engine.perf_counter", lambda: decoder.elapsed)
    settings = DecodingSettings(max_new_tokens=60, exit_layer=1, num_draft_tokens=4, n_gram_match=3, fall_back=True)
    found, hard = decode_batch(
        decoder, [[*range(20), *range(20)], [30]], strategy="self_speculative", settings=settings
    )
    assert all(step.by_n_gram for step in found.steps if step.drafted)
    assert sum(step.drafted > 0 for step in hard.steps) == 8
    assert hard.fell_back_after == 9


def test_n_grams_are_interrupted_once_in_64_rounds_to_time_a_plain_one() -> None:
    result = _looping((), budget=300, strategy="n_gram")
    first = next(index for index, step in enumerate(result.steps) if step.drafted)
    plain = [index for index, step in enumerate(result.steps) if not step.drafted and index > first]
    assert result.fell_back_after is None
    assert len(plain) <= 2


@pytest.mark.parametrize("sampling", [_GREEDY, _SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("strategy", ["self_speculative", "n_gram"])
def test_n_grams_that_are_never_kept_are_given_up_and_the_drafter_goes_on(
    strategy: str, sampling: SamplingSettings
) -> None:
    decoder = counting_decoder(vocab_size=400, max_length=400)
    decoder.extra_token = 0.2
    prompt = [token for number in range(1, 200) for token in (number, 399)]  # 5 was followed by 399 before, not by 6
    needs = {"exit_layer": 1, "num_draft_tokens": 1} if strategy == "self_speculative" else {}
    settings = DecodingSettings(
        max_new_tokens=30, n_gram_match=1, n_gram_max_drafts=4, fall_back=True, sampling=sampling, **needs
    )
    generator = None if sampling.greedy else torch.Generator().manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("app.decoding.engine.perf_counter", lambda: decoder.elapsed)
        result = decode(decoder, [*prompt[:300], 5], strategy=strategy, settings=settings, generator=generator)  # type: ignore[arg-type]
    assert result.tokens == list(range(6, 36))
    found = [step for step in result.steps if step.by_n_gram]
    assert [step.accepted for step in found] == [0] * 8
    assert result.fell_back_after == (None if strategy == "self_speculative" else pytest.approx(11, abs=2))
    if strategy == "self_speculative":
        assert all(step.drafted and not step.by_n_gram for step in result.steps[12:-1])


def _adaptive(misses: tuple[int, ...]) -> DecodingResult:
    decoder = counting_decoder(misses=misses, vocab_size=100, max_length=100)
    decoder.full_logits, decoder.exit_logits = decoder.full_logits * 12, decoder.exit_logits * 12  # confident: 0.999
    settings = DecodingSettings(max_new_tokens=80, exit_layer=1, num_draft_tokens=8, draft_policy="adaptive")
    result = decode(decoder, [0], strategy="self_speculative", settings=settings)
    assert result.tokens == list(range(1, 81))
    return result


def test_adaptive_drafts_long_where_drafts_are_kept_and_short_where_they_are_not() -> None:
    easy, hard = _adaptive(()), _adaptive(_ALL)
    assert [step.drafted for step in easy.steps][:8] == [8] * 8
    drafted = [step.drafted for step in hard.steps]
    assert drafted[0] == 8
    assert set(drafted[10:-1]) == {1}
