from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from app.benchmark.decoding_costs import DecodingCosts
from app.benchmark.output_differences import OutputDifferences
from app.benchmark.round_counts import RoundCounts
from app.errors import ConfigError, DataError
from app.model_files.decoding_defaults import Conditions, DecodingDefaults
from app.spans.decoder import SpanDecoder
from app.tuning import tune as tuning_module
from app.tuning.layer_agreement import LayerAgreement, measure_layer_agreement
from app.tuning.report import tuning_as_json, verifications_table
from app.tuning.result import Tuning, Verification
from app.tuning.speedup_prediction import Prediction, choose_diverse, needed_agreement, predict
from app.tuning.tune import TuningSettings, tune
from tests.support.fake_decoder import counting_decoder
from tests.support.tiny_models import tiny_llama

_COSTS = DecodingCosts(block_seconds=1e-3, head=2.0, draft_head=1.5, first_extra=0.25, extra_token=0.05, overhead=0.5)
_SETTINGS = TuningSettings(max_new_tokens=16, max_draft_tokens=3, num_verified=2, repeats=2)
_PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6]]


def _agreeing_decoder() -> SpanDecoder:
    model = tiny_llama(seed=1, num_layers=4, tied=False)
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.self_attn.o_proj.weight.mul_(0.1)
            layer.mlp.down_proj.weight.mul_(0.1)
    return SpanDecoder(model)


def _prediction(exit_layer: int, drafts: int, speedup: float) -> Prediction:
    return Prediction(
        exit_layer=exit_layer,
        num_draft_tokens=drafts,
        acceptance_rate=0.5,
        mean_tokens_per_round=1.5,
        speedup=speedup,
    )


def _run(prediction: Prediction, speedup: float, low: float | None = None, **given: Any) -> Verification:
    """Measured so, the slowest repeat `low`, and by its interval above 1 if it is."""
    return Verification(
        prediction=prediction,
        acceptance_rate=0.5,
        mean_tokens_per_round=1.5,
        speedup=speedup,
        speedup_range=(speedup if low is None else low, speedup),
        differences=OutputDifferences(num_prompts=4, num_differing=0),
        **({"num_prompts": 4, "num_given": 4, "num_tokens": 200, "interval": (speedup - 1e-4, speedup + 1e-4)} | given),
    )


def _tuning(*measured: float, again: Sequence[tuple[int, float, float]] = ()) -> Tuning:
    """Of exit 1 with 1, 2, ... drafts, all predicted to reach 3x, measured as given.

    `again` tells of the runs after the choice: drafts, speedup, the slowest repeat's.
    """
    runs = [_run(_prediction(1, drafts, 3.0), speedup) for drafts, speedup in enumerate(measured, start=1)]
    agreement = LayerAgreement(
        num_layers=2, outputs=[[5, 6, 7]], budgets=[3], matches={1: [[True, False]], 2: [[True, True]]}
    )
    return Tuning(
        agreement=agreement,
        costs=_COSTS,
        predictions=[run.prediction for run in runs],
        verifications=runs,
        confirmations=[_run(runs[drafts - 1].prediction, speedup, low) for drafts, speedup, low in again],
    )


def test_a_prediction_is_tokens_per_round_over_the_cost_of_a_mean_round() -> None:
    matches = [True, False, True, True, False, True, True]  # by two drafts: 1 of 2, 2 of 2, then 1 of 1 that still fits
    agreement = LayerAgreement(
        num_layers=4,
        outputs=[list(range(8))],
        budgets=[8],
        matches={exit_layer: [matches] for exit_layer in (1, 2, 3, 4)},
    )
    assert agreement.count_rounds(3, 2) == RoundCounts(decoded=7, rounds=3, drafted=5, accepted=4)
    found = predict(agreement, _COSTS, max_draft_tokens=2)
    assert [(p.exit_layer, p.num_draft_tokens) for p in found] == [(e, d) for e in (1, 2, 3) for d in (1, 2)]
    last = found[-1]
    round_cost = 5 / 3 * (3 + 1.5) + 3 + (1 + 2) * (1 + 0.25 + 0.05 * 5 / 3) + 0.5
    assert last.speedup == pytest.approx((7 / 3) * (4 + 2) / round_cost)
    assert last.mean_tokens_per_round == pytest.approx(7 / 3)
    assert last.acceptance_rate == pytest.approx(4 / 5)


def test_drafting_whole_outputs_from_a_perfect_first_exit_is_predicted_to_win_and_from_a_useless_one_to_lose() -> None:
    for match, wins in ((True, True), (False, False)):
        matches = {exit_layer: [[match] * 45] for exit_layer in range(1, 9)}  # five rounds of 8 + 1
        agreement = LayerAgreement(num_layers=8, outputs=[[0] * 46], budgets=[46], matches=matches)
        best = max(predict(agreement, _COSTS, max_draft_tokens=8), key=lambda prediction: prediction.speedup)
        assert (best.speedup > 1.0) is wins
        assert (best.exit_layer, best.num_draft_tokens) == ((1, 8) if wins else (1, 1))


def test_neighbours_of_a_better_setting_are_chosen_last_and_hopeless_ones_never() -> None:
    predictions = [
        _prediction(3, 4, 2.0),
        _prediction(3, 5, 1.99),
        _prediction(4, 6, 1.98),
        _prediction(3, 7, 1.9),
        _prediction(5, 4, 1.8),
        _prediction(9, 9, 1.5),  # below 0.8 of the best
    ]

    def chosen(count: int) -> list[tuple[int, int]]:
        return [(p.exit_layer, p.num_draft_tokens) for p in choose_diverse(predictions, count, num_layers=12)]

    assert chosen(1) == [(3, 4)]
    assert chosen(3) == [(3, 4), (3, 7), (5, 4)]
    assert chosen(4) == [(3, 4), (3, 5), (3, 7), (5, 4)]
    assert chosen(10) == [(3, 4), (3, 5), (4, 6), (3, 7), (5, 4)]


def test_in_a_deep_model_exits_further_apart_count_as_neighbours() -> None:
    predictions = [_prediction(8, 3, 2.0), _prediction(10, 3, 1.9), _prediction(12, 3, 1.8)]
    assert [p.exit_layer for p in choose_diverse(predictions, 2, num_layers=36)] == [8, 12]
    assert [p.exit_layer for p in choose_diverse(predictions, 2, num_layers=12)] == [8, 10]


def test_the_needed_agreement_is_where_one_draft_a_round_breaks_even() -> None:
    model = _COSTS.cost_model(num_layers=12, exit_layer=3)
    acceptance = needed_agreement(model)
    assert 0.0 < acceptance < 1.0
    assert model.speedup(1 + acceptance, 1) == pytest.approx(1.0)


def test_what_was_confirmed_is_recommended_with_the_speedup_of_that_run() -> None:
    tuning = replace(
        _tuning(1.2, 1.4, 1.3, again=[(2, 1.25, 1.1)]),
        conditions=Conditions(dtype="float32", device_type="cpu", threads=2),
    )
    assert tuning.defaults == DecodingDefaults(
        strategy="self_speculative",
        exit_layer=1,
        num_draft_tokens=2,
        head=2.0,
        draft_head=1.5,
        first_extra=0.25,
        extra_token=0.05,
        overhead=0.5,
        measured_speedup=1.25,
        conditions=Conditions(dtype="float32", device_type="cpu", threads=2),
    )
    assert tuning.reason == (
        "self_speculative, exit 1 with 2 drafts: the fastest of 3 settings run; exit 1 with 2 drafts confirmed,"
        " measured 1.250x (predicted 3.000x) when run again on 4 prompts, 95 % interval 1.25..1.25x, whole repeats"
        " 1.100 to 1.250x"
    )


def test_the_second_fastest_is_recommended_where_only_it_was_confirmed() -> None:
    tuning = _tuning(1.2, 1.4, again=[(2, 1.3, 0.99), (1, 1.1, 1.0)])
    assert (tuning.defaults.num_draft_tokens, tuning.defaults.measured_speedup) == (1, 1.1)
    assert tuning.reason.startswith(
        "self_speculative, exit 1 with 1 draft: the second fastest of 2 settings run; exit 1"
    )
    assert "exit 1 with 2 drafts not confirmed, measured 1.300x" in tuning.reason
    report = tuning_as_json(tuning)
    assert [(run["prediction"]["num_draft_tokens"], run["holds"]) for run in report["confirmed"]] == [
        (2, False),
        (1, True),
    ]
    assert [row[-1] for row in verifications_table(tuning).rows] == ["first", "first", "again", "again"]


def test_a_lead_that_is_gone_when_run_again_is_not_recommended() -> None:
    tuning = _tuning(1.003, 0.9, again=[(1, 1.01, 0.97)])
    assert tuning.defaults == DecodingDefaults(
        strategy="autoregressive", head=2.0, draft_head=1.5, first_extra=0.25, extra_token=0.05, overhead=0.5
    )
    assert tuning.reason.startswith(
        "autoregressive: no setting kept its lead when it was run again; exit 1 with 1 draft"
    )
    assert _tuning(1.003, 0.9, again=[(1, 0.99, 1.0)]).defaults.strategy == "autoregressive"
    assert _tuning(1.003, 0.9, again=[(1, 1.001, 1.0)]).defaults.strategy == "self_speculative"


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        (
            {"num_prompts": 1, "num_given": 6, "interval": None},
            "on 1 of 6 prompts and 200 tokens; a choice takes at least 4 prompts and 200 tokens: give more",
        ),
        ({"num_tokens": 199}, "on 4 prompts and 199 tokens; a choice takes"),
        ({"interval": (0.99, 7.6)}, ""),
        ({"interval": (1.0, 7.5)}, ""),
    ],
)
def test_a_lead_on_too_little_or_within_its_interval_is_not_recommended(given: dict[str, Any], missing: str) -> None:
    again = replace(_tuning(2.75).verifications[0], **given)
    tuning = replace(_tuning(2.75), confirmations=[again])
    assert tuning.defaults.strategy == "autoregressive"
    assert missing in tuning.shortfall
    assert bool(tuning.shortfall) == tuning.reason.startswith("none: ") == bool(missing)
    assert replace(tuning, confirmations=[_run(again.prediction, 2.75)]).defaults.strategy == "self_speculative"


def test_nothing_measured_below_one_is_ever_recommended() -> None:
    tuning = _tuning(0.7, 0.999)
    assert tuning.defaults.strategy == "autoregressive"
    assert tuning.reason.startswith("autoregressive: even exit 1 with 2 drafts")
    assert "agrees with the full model on 50% of the tokens; with 98%, one draft a round would gain" in tuning.reason
    dear = replace(tuning, costs=replace(_COSTS, overhead=50.0))
    assert dear.reason.endswith("of the tokens; no share makes a draft gain here")
    cheap = replace(
        tuning, costs=replace(_COSTS, head=0.0, draft_head=0.0, first_extra=0.0, extra_token=0.0, overhead=0.0)
    )
    assert needed_agreement(cheap.costs.cost_model(num_layers=2, exit_layer=1)) == 0.5
    assert "would gain" not in cheap.reason  # 50% would have been enough


@pytest.mark.parametrize(
    ("verified", "confirmed", "run", "chosen"),
    [
        ((1.5, 1.2), (1.4,), [1], 1),  # the first holds
        ((1.2, 1.5), (0.9, 1.1), [2, 1], 1),
        ((1.2, 1.5), (0.9, 0.9), [2, 1], None),
        ((1.5, 0.9), (0.9,), [1], None),  # no use running the second again
        ((0.9, 0.8), (), [], None),
        ((1.2, 1.5, 1.4), (0.9, 0.9), [2, 3], None),  # the runner-up once, no third
    ],
)
def test_the_fastest_is_run_again_and_the_second_fastest_where_it_does_not_hold(
    monkeypatch: pytest.MonkeyPatch,
    verified: tuple[float, ...],
    confirmed: tuple[float, ...],
    run: list[int],
    chosen: int | None,
) -> None:
    settings = [_prediction(1, drafts, 3.0) for drafts in range(1, len(verified) + 1)]
    calls: list[tuple[list[int], TuningSettings]] = []
    again = iter(confirmed)

    def verify(_: object, __: object, which: list[Prediction], *, eos_token_ids: object, settings: TuningSettings) -> (
        list[Verification]
    ):  # fmt: skip
        calls.append(([prediction.num_draft_tokens for prediction in which], settings))
        speedups = verified if len(calls) == 1 else (next(again),)
        return [_run(*pair) for pair in zip(which, speedups, strict=True)]

    monkeypatch.setattr(tuning_module, "choose_diverse", lambda *_, **__: settings)
    monkeypatch.setattr(tuning_module, "_verify", verify)
    tuning = tune(counting_decoder(), _PROMPTS, eos_token_ids=(), settings=replace(_SETTINGS, time_limit_seconds=100.0))
    assert [which for which, _ in calls] == [[p.num_draft_tokens for p in settings], *([drafts] for drafts in run)]
    assert [used.repeats for _, used in calls] == [2, *[5] * len(run)]
    assert [used.time_limit_seconds for _, used in calls] == [40.0, *[20.0] * len(run)]
    assert tuning.defaults.num_draft_tokens == chosen
    assert next(again, None) is None


def test_a_best_draft_length_at_the_edge_of_what_was_looked_at_is_told() -> None:
    def advice(*predicted: float) -> str:
        tuning = _tuning(1.2, 1.1, 1.3, again=[(3, 1.3, 1.2)])
        return replace(tuning, predictions=[_prediction(1, d, s) for d, s in enumerate(predicted, start=1)]).advice

    assert advice(1.0, 1.1, 1.2) == (
        "exit 1 is predicted to be fastest with 3 drafts, the most that was looked at: raise max_draft_tokens"
    )
    assert advice(1.0, 1.2, 1.1) == ""
    assert advice(1.0, 1.2, 1.2) == ""  # budgets allow no longer draft


@pytest.mark.parametrize(("max_new_tokens", "most"), [(16, 3), (5, 3), (4, 2), (2, 1)])
def test_no_draft_is_looked_at_that_an_output_has_no_room_for(max_new_tokens: int, most: int) -> None:
    tuning = tune(
        counting_decoder(), _PROMPTS, eos_token_ids=(), settings=replace(_SETTINGS, max_new_tokens=max_new_tokens)
    )
    assert max(prediction.num_draft_tokens for prediction in tuning.predictions) == most
    assert tuning.limited_by == ("max_draft_tokens" if most == 3 else "max_new_tokens")


def test_costs_are_the_median_of_three_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = DecodingCosts(block_seconds=9.0, head=0.0, draft_head=0.0, first_extra=0.0, extra_token=0.9, overhead=90.0)
    moments, asked = iter([busy, replace(_COSTS, head=1.5), _COSTS]), list[dict[str, int]]()
    monkeypatch.setattr(
        tuning_module, "measure_decoding_costs", lambda _, **options: (asked.append(options), next(moments))[1]
    )
    tuning = tune(counting_decoder(), _PROMPTS, eos_token_ids=(), settings=_SETTINGS)
    assert tuning.costs == replace(_COSTS, head=1.5)
    assert tuning.predictions == predict(tuning.agreement, tuning.costs, max_draft_tokens=3)
    assert asked == [{"context_length": 4 + 8, "max_positions": 4, "repeats": 3}] * 3


def test_runs_of_a_real_model_come_out_as_simulated_and_lossless() -> None:
    tuning = tune(_agreeing_decoder(), _PROMPTS, eos_token_ids=(), settings=_SETTINGS)
    assert [p.exit_layer for p in tuning.predictions] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert len(tuning.verifications) == 2
    for run in tuning.verifications:
        assert run.differences == OutputDifferences(num_prompts=2, num_differing=0)
        assert run.num_prompts == 2
        assert run.acceptance_rate == run.prediction.acceptance_rate
        assert run.mean_tokens_per_round == run.prediction.mean_tokens_per_round
        assert run.speedup_range[0] <= run.speedup_range[1]
        assert run.num_tokens == 2 * 15
        assert run.interval is not None
        assert run.interval[0] < run.speedup < run.interval[1]
    assert tuning.best.speedup == max(run.speedup for run in tuning.verifications)


def test_a_used_up_time_limit_leaves_one_prompt() -> None:
    tuning = tune(_agreeing_decoder(), _PROMPTS, eos_token_ids=(), settings=replace(_SETTINGS, time_limit_seconds=0.0))
    assert len(tuning.agreement.outputs) == tuning.best.num_prompts == 1
    assert "on 1 of 2 prompts and 15 tokens" in tuning.reason


def test_prompts_that_the_first_pass_had_no_time_for_are_run_when_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning_module, "_FOR_OUTPUTS", 0.0)
    tuning = tune(_agreeing_decoder(), _PROMPTS, eos_token_ids=(), settings=_SETTINGS)
    assert (len(tuning.agreement.outputs), tuning.best.num_prompts, tuning.best.num_given) == (1, 2, 2)


def test_prompts_whose_output_is_one_token_are_not_run() -> None:
    decoder = counting_decoder(max_length=64)
    tuning = tune(decoder, [[4], [7], [9]], eos_token_ids=(5,), settings=_SETTINGS)  # 5 comes right after 4
    assert len(tuning.agreement.outputs) == 3
    assert tuning.best.num_prompts == 2
    with pytest.raises(DataError, match="first token"):
        tune(decoder, [[4]], eos_token_ids=(5,), settings=_SETTINGS)


def test_a_model_of_one_block_is_refused_before_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SpanDecoder, "run_blocks", None)
    with pytest.raises(ConfigError, match="num_layers"):
        tune(SpanDecoder(tiny_llama(num_layers=1)), _PROMPTS, eos_token_ids=(), settings=_SETTINGS)


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_new_tokens", 1), ("max_draft_tokens", 0), ("num_verified", 0), ("repeats", 0), ("time_limit_seconds", -1.0)],
)
def test_settings_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        TuningSettings(**{field: value})  # type: ignore[arg-type]


def test_agreement_of_the_agreeing_decoder_is_neither_nothing_nor_all() -> None:
    agreement = measure_layer_agreement(_agreeing_decoder(), _PROMPTS, max_new_tokens=16)
    assert 0.0 < agreement.agreement(1) < 1.0
