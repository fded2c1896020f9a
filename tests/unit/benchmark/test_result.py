from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from app.benchmark.alternation import Contender, Measurement
from app.benchmark.benchmark import Benchmark, Costs
from app.benchmark.decoding_costs import DecodingCosts
from app.benchmark.output_differences import OutputDifferences
from app.benchmark.result import BenchmarkResult, benchmark_results, round_costs
from app.benchmark.transformers_baseline import GenerateResult
from app.decoding.result import DecodingResult, Step
from app.decoding.settings import DecodingSettings

COSTS = DecodingCosts(block_seconds=1e-3, head=2.0, draft_head=1.5, first_extra=0.25, extra_token=0.05, overhead=0.5)
SMALL = DecodingCosts(block_seconds=5e-4, head=1.0, draft_head=1.0, first_extra=0.0, extra_token=0.01, overhead=9.0)
DECODER: Any = SimpleNamespace(num_layers=10, exit_block_size=lambda _: 0, block_size=1, draft_vocabulary=None)
SMALL_DECODER: Any = SimpleNamespace(num_layers=4)
TOKENS = list(range(9))
KEPT, CUT = Step([1, 2, 3, 4], 3), Step([5], 0, (7, 7, 7))  # of three drafts: all kept, and none


def _measurement(
    strategy: str, *runs: DecodingResult, exit_layer: int | None = None, drafts: int | None = None, **others: Any
) -> Measurement:
    """One prompt, decoded once in each repeat."""
    settings = DecodingSettings(max_new_tokens=9, exit_layer=exit_layer, num_draft_tokens=drafts, **others)
    contender = Contender(strategy=strategy, settings=settings, decode=lambda *_: [])
    return Measurement(contender=contender, runs=[[[run] for run in runs]])


def _run(seconds: float, *steps: Step, tokens: Sequence[int] = TOKENS) -> DecodingResult:
    return DecodingResult(
        tokens=list(tokens), stop_reason="eos", seconds_prefill=0.25, seconds_decode=seconds, steps=steps
    )


def _results(*measurements: Measurement, costs: Costs | None = None) -> list[BenchmarkResult]:
    differences = [OutputDifferences(num_prompts=1, num_differing=0)] * len(measurements)
    return benchmark_results(Benchmark(list(measurements), costs, differences), DECODER)


PLAIN = _measurement("autoregressive", _run(8.0), _run(16.0), _run(8.0))
SPECULATIVE = _measurement(
    "self_speculative",
    *(_run(seconds, KEPT, CUT, KEPT) for seconds in (4.0, 2.0, 8.0)),
    exit_layer=3,
    drafts=3,
    costs=SMALL.cost_model(num_layers=10, exit_layer=3),  # those known before it ran, by which nothing is judged
)


def test_figures_by_hand() -> None:
    plain, speculative = _results(PLAIN, SPECULATIVE)
    assert (plain.speedup, plain.identical_to_autoregressive, plain.acceptance_rate) == (1.0, 1.0, None)
    assert (plain.tokens_per_second, plain.seconds_per_token, plain.seconds_prefill) == (1.0, 1.0, 0.25)
    assert (speculative.exit_layer, speculative.num_draft_tokens) == (3, 3)
    assert (speculative.tokens_per_second, speculative.seconds_per_token, speculative.speedup) == (2.0, 0.5, 2.0)
    assert (speculative.speedup_min, speculative.speedup_max, speculative.speedup_interval) == (1.0, 8.0, None)
    twice = _results(*(replace(each, runs=[*each.runs] * 2) for each in (PLAIN, SPECULATIVE)))[1]
    assert twice.speedup_interval == (2.0, 2.0)  # of two batches alike
    assert (speculative.drafted, speculative.accepted, speculative.rounds) == (9, 6, 3)
    assert speculative.acceptance_rate == pytest.approx(6 / 9)
    assert speculative.mean_tokens_per_round == pytest.approx(8 / 3)
    assert (speculative.reached_by_position, speculative.accepted_by_position) == ([3, 2, 2], [2, 2, 2])
    assert speculative.acceptance_by_position == pytest.approx([2 / 3, 1.0, 1.0])
    assert (speculative.num_prompts, speculative.num_tokens, speculative.fell_back_share) == (1, 9, 0.0)


@pytest.mark.parametrize(("vocabulary", "size"), [(None, None), (range(40), 40)])
def test_only_what_drafts_with_the_models_own_head_has_a_draft_vocabulary(
    monkeypatch: pytest.MonkeyPatch, vocabulary: range | None, size: int | None
) -> None:
    monkeypatch.setattr(DECODER, "draft_vocabulary", vocabulary)
    skip = _measurement("layer_skip", _run(2.0, KEPT), drafts=3)
    others = [_measurement(name, _run(2.0)) for name in ("draft_model", "early_exit", "n_gram", "transformers")]
    found = _results(PLAIN, SPECULATIVE, skip, *others)
    assert [result.draft_vocabulary_size for result in found] == [None, size, size, None, None, None, None]


def test_predictions_are_the_cost_model_fed_with_what_was_measured() -> None:
    _, speculative = _results(PLAIN, SPECULATIVE, costs=Costs(COSTS, None))
    round_cost = 3 * (3 + 1.5) + 3 + (10 - 3 + 2) * (1 + 0.25 + 0.05 * 3) + 0.5
    chance = 6 / 7  # of the drafts that were reached; 6 of 9 would take the unseen ones for rejected
    expected = (1 + chance + chance**2 + chance**3) * (10 + 2) / round_cost
    assert speculative.predicted_speedup == pytest.approx(expected)
    assert speculative.prediction_error == pytest.approx(expected / 2.0 - 1.0)
    from_rounds = (8 / 3) * (10 + 2) / round_cost
    assert speculative.predicted_speedup_from_rounds == pytest.approx(from_rounds)
    assert speculative.prediction_error_from_rounds == pytest.approx(from_rounds / 2.0 - 1.0)


@pytest.mark.parametrize("options", [{"draft_policy": "adaptive"}, {"fall_back": True}])
def test_drafts_of_varying_length_are_predicted_from_their_rounds_alone(options: dict[str, Any]) -> None:
    contender = replace(SPECULATIVE.contender, settings=replace(SPECULATIVE.contender.settings, **options))
    _, speculative = _results(PLAIN, replace(SPECULATIVE, contender=contender), costs=Costs(COSTS, None))
    assert (speculative.predicted_speedup, speculative.prediction_error) == (None, None)
    assert speculative.predicted_speedup_from_rounds is not None


def test_what_shares_no_computation_is_costed_as_two_passes() -> None:
    def costs_of(strategy: str, costs: Costs, **settings: Any) -> Any:
        return round_costs(_measurement(strategy, drafts=3, **settings).contender, costs, DECODER)

    skip = costs_of("layer_skip", Costs(COSTS, None), skipped_layers=(4, 5, 5, 6))
    assert (skip.draft_step, skip.draft_tail, skip.verify, skip.plain_step) == (10 - 3 + 1.5, 0.0, 12.0, 12.0)
    assert (skip.extra_token, skip.overhead) == (0.05, 0.5 + 0.25 * 12)
    small = costs_of("draft_model", Costs(COSTS, SMALL), draft_decoder=SMALL_DECODER)
    assert small.draft_step == pytest.approx((4 + 1) / 2)  # its blocks take half as long
    assert costs_of("draft_model", Costs(COSTS, None), draft_decoder=SMALL_DECODER) is None
    assert costs_of("transformers_early_exit", Costs(COSTS, SMALL), exit_layer=3) is None


def test_speedups_over_transformers_are_there_where_it_was_measured_with_the_same_setting() -> None:
    generate = _measurement("transformers", *[_run(12.0)] * 3)
    early = GenerateResult(
        tokens=TOKENS, stop_reason="eos", seconds_prefill=1.0, seconds_decode=6.0, steps=(), num_prefilled=3
    )
    pair = _measurement("transformers_early_exit", early, early, early, exit_layer=3, drafts=3)
    other = _measurement("transformers_early_exit", early, early, early, exit_layer=3, drafts=4)
    plain, speculative, slow, same, _ = _results(PLAIN, SPECULATIVE, generate, pair, other)
    assert (plain.speedup_vs_transformers, plain.speedup_vs_transformers_early_exit) == (1.5, None)
    assert (speculative.speedup_vs_transformers, speculative.speedup_vs_transformers_early_exit) == (3.0, 2.0)
    assert slow.speedup == pytest.approx(2 / 3)
    assert (same.seconds_per_token, same.speedup) == (1.0, 1.0)  # six tokens after the three that came first
    assert _results(PLAIN, SPECULATIVE)[1].speedup_vs_transformers is None


def test_outputs_that_differ_in_any_repeat_are_counted() -> None:
    right, wrong = _run(4.0), _run(4.0, tokens=[*TOKENS[:-1], 99])
    shares = [
        _results(PLAIN, _measurement("self_speculative", right, right, last))[1].identical_to_autoregressive
        for last in (right, wrong)
    ]
    assert shares == [1.0, 0.0]


def test_outputs_of_one_token_have_no_speed_and_divide_nothing_by_zero() -> None:
    nothing = [_run(0.0, tokens=[3])] * 3
    plain, speculative = _results(
        _measurement("autoregressive", *nothing),
        _measurement("self_speculative", *nothing, exit_layer=3, drafts=2),
        costs=Costs(COSTS, None),
    )
    for result in (plain, speculative):
        assert (result.speedup, result.tokens_per_second, result.seconds_per_token) == (None, None, None)
        assert (result.predicted_speedup, result.speedup_min, result.speedup_max) == (None, None, None)
        assert (result.acceptance_rate, result.mean_tokens_per_round, result.acceptance_by_position) == (None, None, [])
