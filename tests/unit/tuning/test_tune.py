from dataclasses import replace

import pytest

from app.benchmark.decoding_costs import DecodingCosts
from app.benchmark.output_differences import OutputDifferences
from app.decoding.settings import DecodingSettings
from app.errors import DataError
from app.spans.decoder import SpanDecoder
from app.tuning import tune as tuning_module
from app.tuning.result import Verification
from app.tuning.speedup_prediction import Prediction, predict
from app.tuning.tune import TuningSettings, tune
from tests.support.fake_decoder import counting_decoder
from tests.support.tiny_models import settling_llama
from tests.unit.tuning.made_up import COSTS, make_prediction, make_run

_SETTINGS = TuningSettings(max_new_tokens=16, max_draft_tokens=3, num_verified=2, repeats=2, n_gram_match=())
_PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6]]


def _agreeing_decoder() -> SpanDecoder:
    return SpanDecoder(settling_llama(later_blocks=0.1))


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
    settings = [make_prediction(1, drafts, 3.0) for drafts in range(1, len(verified) + 1)]
    calls: list[tuple[list[int], TuningSettings]] = []
    again = iter(confirmed)

    def verify(
        _: object, __: object, which: list[Prediction], settings: TuningSettings, ___: object
    ) -> list[Verification]:
        calls.append(([prediction.num_draft_tokens for prediction in which], settings))
        speedups = verified if len(calls) == 1 else (next(again),)
        return [make_run(*pair) for pair in zip(which, speedups, strict=True)]

    monkeypatch.setattr(tuning_module, "choose_diverse", lambda *_, **__: settings)
    monkeypatch.setattr(tuning_module, "with_policies", lambda chosen, *_, **__: chosen)
    monkeypatch.setattr(tuning_module, "_verify", verify)
    tuning = tune(counting_decoder(), _PROMPTS, replace(_SETTINGS, time_limit_seconds=100.0))
    assert [which for which, _ in calls] == [[p.num_draft_tokens for p in settings], *([drafts] for drafts in run)]
    assert [used.repeats for _, used in calls] == [2, *[5] * len(run)]
    assert [used.time_limit_seconds for _, used in calls] == [40.0, *[20.0] * len(run)]
    assert tuning.defaults.num_draft_tokens == chosen
    assert next(again, None) is None


@pytest.mark.parametrize(("max_new_tokens", "most"), [(5, 3), (4, 2)])
def test_no_draft_is_looked_at_that_an_output_has_no_room_for(max_new_tokens: int, most: int) -> None:
    settings = replace(_SETTINGS, max_new_tokens=max_new_tokens)
    tuning = tune(counting_decoder(), _PROMPTS, settings)
    assert max(prediction.num_draft_tokens for prediction in tuning.predictions) == most
    assert tuning.limited_by == ("max_draft_tokens" if most == 3 else "max_new_tokens")
    assert replace(_SETTINGS, max_new_tokens=2).longest_draft == 1


def test_costs_are_the_median_of_three_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = DecodingCosts(block_seconds=9.0, head=0.0, draft_head=0.0, first_extra=0.0, extra_token=0.9, overhead=90.0)
    moments, asked = iter([busy, replace(COSTS, head=1.5), COSTS]), list[dict[str, int]]()
    monkeypatch.setattr(
        tuning_module, "measure_decoding_costs", lambda _, **options: (asked.append(options), next(moments))[1]
    )
    tuning = tune(counting_decoder(), _PROMPTS, _SETTINGS)
    assert tuning.costs == replace(COSTS, head=1.5)
    assert tuning.predictions == predict(tuning.agreement, tuning.costs, max_draft_tokens=3)
    assert asked == [{"context_length": 4 + 8, "max_positions": 4, "repeats": 3}] * 3


def test_runs_of_a_real_model_come_out_as_simulated_and_lossless(monkeypatch: pytest.MonkeyPatch) -> None:
    # A busy machine measures costs by which n-grams may look hopeless, and are not run.
    monkeypatch.setattr(tuning_module, "measure_decoding_costs", lambda *_, **__: COSTS)
    tuning = tune(_agreeing_decoder(), _PROMPTS, replace(_SETTINGS, n_gram_match=(1,)))
    exits = [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [p.exit_layer for p in tuning.predictions] == [*exits, *exits, None, None, None]
    assert {run.prediction.n_gram_match for run in tuning.verifications} == {None, 1}
    assert "adaptive" in {run.prediction.draft_policy for run in tuning.verifications}
    for run in tuning.verifications:
        assert run.differences == OutputDifferences(num_prompts=2, num_differing=0)
        assert run.num_prompts == 2
        if run.prediction.draft_policy == "fixed":
            assert run.acceptance_rate == run.prediction.acceptance_rate
            assert run.mean_tokens_per_round == run.prediction.mean_tokens_per_round
        assert run.speedup_range[0] <= run.speedup_range[1]
        assert run.num_tokens == 2 * 15
        assert run.interval is not None
        assert run.interval[0] < run.speedup < run.interval[1]
    assert tuning.best.speedup == max(run.speedup for run in tuning.verifications)


def test_sizes_of_the_draft_vocabulary_are_run_as_simulated_with_costs_on_a_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder, used = _agreeing_decoder(), list[object]()
    whole, ids = decoder.vocab_size, [*range(decoder.vocab_size - 8)]
    size = len(ids)
    decoder.use_draft_vocabulary(ids)

    def measured(asked: SpanDecoder, **_: int) -> DecodingCosts:
        used.append(asked.draft_vocabulary)
        return replace(COSTS, draft_head=1.0 + 0.01 * len(asked.draft_vocabulary or range(whole)))

    monkeypatch.setattr(tuning_module, "measure_decoding_costs", measured)
    ends = tuple(range(size // 4 + 1))  # a quarter of the list would not hold them
    monkeypatch.setattr(TuningSettings, "plain", DecodingSettings(max_new_tokens=16))  # and none of them ends anything
    tuning = tune(decoder, _PROMPTS, replace(_SETTINGS, num_verified=9, eos_token_ids=ends))
    assert used == [None, tuple(ids)] * 3
    assert decoder.draft_vocabulary == tuple(ids), "the decoder is left as it was"
    assert [p.draft_vocabulary_size for p in tuning.predictions] == [None] * 9 + [size] * 9 + [size // 2] * 9
    assert tuning.draft_heads == pytest.approx({size: 1.0 + 0.01 * size, size // 2: 1.0 + 0.01 * (size // 2)})
    assert tuning.costs == replace(COSTS, draft_head=pytest.approx(1.0 + 0.01 * whole))
    first = tuning.predictions[9]
    model = replace(COSTS, draft_head=tuning.draft_heads[size]).cost_model(num_layers=4, exit_layer=1)
    counts = tuning.agreement.count_rounds(1, 1, size=size)
    assert first.speedup == pytest.approx(counts.predicted_speedup(model))
    assert {run.prediction.draft_vocabulary_size for run in tuning.verifications} == {None, size}
    for run in tuning.verifications:
        assert run.differences.num_differing == 0
        fixed = run.prediction.draft_policy == "fixed"
        assert not fixed or run.acceptance_rate == run.prediction.acceptance_rate, run.prediction


def test_costs_that_seem_to_fall_with_the_draft_vocabulary_are_taken_for_equal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = _agreeing_decoder()
    decoder.use_draft_vocabulary([0, 1, 2])
    monkeypatch.setattr(
        tuning_module,
        "measure_decoding_costs",
        lambda asked, **_: replace(COSTS, draft_head=1.0 if asked.draft_vocabulary is None else 2.0),
    )
    tuning = tune(decoder, _PROMPTS, _SETTINGS)
    assert {tuning.costs.draft_head, *tuning.draft_heads.values()} == {1.5}
    assert sorted(tuning.draft_heads) == [1, 3]


def test_a_used_up_time_limit_leaves_one_prompt() -> None:
    tuning = tune(_agreeing_decoder(), _PROMPTS, replace(_SETTINGS, time_limit_seconds=0.0))
    assert len(tuning.agreement.outputs) == tuning.best.num_prompts == 1
    assert "on 1 of 2 prompts and 15 tokens" in tuning.reason


def test_prompts_that_the_first_pass_had_no_time_for_are_run_when_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning_module, "_FOR_OUTPUTS", 0.0)
    tuning = tune(_agreeing_decoder(), _PROMPTS, _SETTINGS)
    assert (len(tuning.agreement.outputs), tuning.best.num_prompts, tuning.best.num_given) == (1, 2, 2)


def test_prompts_whose_output_is_one_token_are_not_run() -> None:
    decoder = counting_decoder(max_length=64)
    tuning = tune(decoder, [[4], [7], [9]], replace(_SETTINGS, eos_token_ids=(5,)))  # 5 comes right after 4
    assert len(tuning.agreement.outputs) == 3
    assert tuning.best.num_prompts == 2
    with pytest.raises(DataError, match="first token"):
        tune(decoder, [[4]], replace(_SETTINGS, eos_token_ids=(5,)))
