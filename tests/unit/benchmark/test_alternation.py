import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest

from app.benchmark import alternation
from app.benchmark.alternation import Contender, Measurement, Prompts, alternate, engine_contender
from app.decoding.cost_model import CostModel
from app.decoding.result import DecodingResult, RoundCounts, Step
from app.decoding.settings import DecodingSettings
from tests.support.fake_decoder import counting_decoder


def _result(tokens: Sequence[int], *, seconds: float = 1.0, steps: tuple[Step, ...] = ()) -> DecodingResult:
    return DecodingResult(
        tokens=list(tokens), stop_reason="eos", seconds_prefill=seconds / 10, seconds_decode=seconds, steps=steps
    )


def _contender(name: str, calls: list[tuple[str, list[int], int]], *, budget: int) -> Contender:
    """Says when it is called; its tokens are the budget's."""

    def decode(prompts: Prompts, settings: DecodingSettings) -> list[DecodingResult]:
        calls.append((name, [prompt[0] for prompt in prompts], settings.max_new_tokens))
        return [_result(range(settings.max_new_tokens)) for _ in prompts]

    return Contender(strategy=name, settings=DecodingSettings(max_new_tokens=budget), decode=decode)


def _measurement(*batches: Sequence[Sequence[DecodingResult]]) -> Measurement:
    return Measurement(contender=_contender("x", [], budget=2), runs=batches)


def test_everyone_decodes_every_batch_in_turn_and_another_begins_each_time() -> None:
    calls: list[tuple[str, list[int], int]] = []
    alternate([_contender(name, calls, budget=20) for name in "abc"], [[[1], [2]], [[3]]], repeats=2)
    assert "".join(name for name, *_ in calls) == "abc" + "abcbca" + "bcacab"  # warm-up, then both batches, twice
    assert [prompts for _, prompts, _ in calls] == [[1, 2]] * 6 + [[3]] * 3 + [[1, 2]] * 3 + [[3]] * 3
    assert [budget for *_, budget in calls] == [16] * 3 + [20] * 12


def test_a_warm_up_is_no_longer_than_the_budget_and_counts_for_nothing() -> None:
    calls: list[tuple[str, list[int], int]] = []
    measured = alternate([_contender("a", calls, budget=3)], [[[1]]], repeats=2)
    assert [budget for *_, budget in calls] == [3, 3, 3]
    assert len(measured[0].runs[0]) == 2


def test_no_batch_is_started_after_the_time_limit_but_the_first_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks, done = itertools.count(), list[int]()
    monkeypatch.setattr(alternation, "perf_counter", lambda: float(next(ticks)))  # one second a batch

    def measure(limit: float, repeats: int = 1, fewest: int = 1) -> list[Measurement]:
        contenders = [_contender(name, [], budget=2) for name in "ab"]
        batches = [[[1]], [[2]], [[3]]]
        limits = {"time_limit_seconds": limit, "fewest": fewest}
        return alternate(contenders, batches, repeats=repeats, on_batch=done.append, **limits)

    assert [[len(each.runs) for each in measure(limit)] for limit in (0.0, 1.5, 9.0)] == [[1, 1], [2, 2], [3, 3]]
    assert done == [1, 1, 2, 1, 2, 3]
    assert [len(each.runs) for each in measure(0.0, fewest=2)] == [2, 2]
    # All prompts are seen before any is seen again, and a repeat of some of them does not count.
    assert [[len(of_batch) for of_batch in each.runs] for each in measure(4.5, repeats=3)] == [[1, 1, 1]] * 2
    assert [[len(of_batch) for of_batch in each.runs] for each in measure(5.5, repeats=3)] == [[2, 2, 2]] * 2


def test_a_batch_takes_as_long_as_its_longest_row_and_of_the_repeats_the_median_counts() -> None:
    def repeat(*seconds: float) -> list[DecodingResult]:
        return [_result([1, 2, 3], seconds=each) for each in seconds]

    measured = _measurement([repeat(1, 9), repeat(5, 2), repeat(7, 8)], [repeat(4), repeat(100), repeat(6)])
    assert measured.seconds_by_batch() == [8, 6]
    assert measured.seconds_per_token() == pytest.approx((8 + 6) / 6)  # two after the first of each of three
    assert [measured.seconds_per_token(i) for i in range(3)] == pytest.approx([13 / 6, 105 / 6, 14 / 6])
    assert measured.seconds_prefill == pytest.approx((0.8 + 0.6) / 2)


def test_speedup_is_the_ratio_of_times_per_token_whatever_the_lengths_of_outputs() -> None:
    slow = _measurement([[_result(range(11), seconds=20.0)], [_result(range(11), seconds=40.0)]])
    fast = _measurement([[_result(range(6), seconds=5.0)], [_result(range(6), seconds=5.0)]])
    assert fast.speedup_over(slow) == pytest.approx(3.0)
    assert fast.speedup_range(slow) == pytest.approx((2.0, 4.0))
    empty = _measurement([[_result([1], seconds=0.0)]])
    assert (empty.speedup_over(slow), slow.speedup_over(empty)) == (None, None)


def test_counts_are_pooled_over_prompts_and_draft_positions() -> None:
    first = _result([1, 2, 3, 4, 5], steps=(Step([2, 3, 4], 2, (9,)), Step([5], 0, (9,))))
    second = _result([1, 2], steps=(Step([2], 0, (8, 8)),))
    measured = _measurement([[first]], [[second]])
    assert measured.counts == RoundCounts(num_decoded=5, rounds=3, drafted=6, accepted=2)
    assert measured.reached_by_position == [3, 1, 1]
    assert measured.accepted_by_position == [1, 1, 0]
    assert measured.counts.acceptance_rate == pytest.approx(2 / 6)
    assert measured.counts.mean_tokens_per_round == pytest.approx(5 / 3)


def test_rounds_of_n_grams_are_counted_apart_and_predicted_by_what_they_cost() -> None:
    steps = (Step([2, 3, 4], 2, (9,)), Step([5, 6], 1, (9, 9, 9), True), Step([7], 0, (9,), True), Step([8]))
    measured = _measurement([[_result(range(1, 9), steps=steps)]])
    counts = RoundCounts(
        num_decoded=7, rounds=4, drafted=8, accepted=3, rounds_by_n_gram=2, drafted_by_n_gram=5, accepted_by_n_gram=1
    )
    assert measured.counts == counts
    costs = CostModel(plain_step=10, draft_step=2, draft_tail=3, verify=7, extra_token=0.1, overhead=0.5)
    drafter = 2 * (1.5 * 2 + 3 + 7 * 1.15 + 0.5)  # 3 drafts in two rounds
    assert counts.predicted_speedup(costs) == pytest.approx(7 * 10 / (drafter + 2 * (10 * 1.25 + 0.5)))
    alone = replace(counts, drafted=5, accepted=1)
    assert alone.predicted_speedup(costs) == pytest.approx(7 * 10 / (2 * 10 + 2 * (10 * 1.25 + 0.5)))


def test_an_output_is_identical_if_it_is_in_every_repeat() -> None:
    expected = _measurement([[_result([1, 2]), _result([3])], [_result([9, 9]), _result([9])]])
    same = _measurement([[_result([1, 2]), _result([3])]] * 2)
    once = _measurement([[_result([1, 2]), _result([3])], [_result([1, 2]), _result([3, 4])]])
    assert same.identical_to(expected) == [True, True]
    assert once.identical_to(expected) == [True, False]


def test_an_engine_contender_decodes_with_its_strategy_and_settings() -> None:
    settings = DecodingSettings(max_new_tokens=9, exit_layer=2, num_draft_tokens=3)
    contender = engine_contender(counting_decoder(), "self_speculative", settings)
    assert (contender.strategy, contender.label) == ("self_speculative", "self_speculative, exit 2, drafts 3")
    results = contender.decode([[1], [10, 11]], contender.settings)
    assert [result.tokens for result in results] == [list(range(2, 11)), list(range(12, 21))]
    assert [result.drafted for result in results] == [6, 6]
