from dataclasses import replace
from typing import Any

import pytest

from app.model_files.decoding_defaults import Conditions, DecodingDefaults
from app.tuning.result import exits_table, tuning_as_json, verifications_table
from app.tuning.speedup_prediction import needed_agreement
from tests.unit.tuning.made_up import COSTS, make_prediction, make_run, make_tuning


def test_what_was_confirmed_is_recommended_with_the_speedup_of_that_run() -> None:
    tuning = replace(
        make_tuning(1.2, 1.4, 1.3, again=[(2, 1.25, 1.1)]),
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
    tuning = make_tuning(1.2, 1.4, again=[(2, 1.3, 0.99), (1, 1.1, 1.0)])
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
    rows = verifications_table(tuning).rows
    assert [row[-1] for row in rows] == ["first", "first", "again", "again"]
    assert rows[2] == (
        *("1", "2", "50.0%", "1.50", "3.00x", "1.30x", "1.30..1.30x", "0.99..1.30x", "0 of 4"),
        "again",
    )  # no outputs differ, so there is no column for the largest logit gap


def test_n_grams_are_recommended_alone_or_beside_an_exit_and_named() -> None:
    tuning = make_tuning(1.2, 1.4)
    both = make_run(replace(make_prediction(1, 2, 3.0), n_gram_match=3), 1.5)
    alone = make_run(replace(both.prediction, exit_layer=None, num_draft_tokens=None), 1.3)
    tuning = replace(tuning, predictions=[*tuning.predictions, both.prediction, alone.prediction])
    beside = replace(tuning, verifications=[*tuning.verifications, both], confirmations=[both]).defaults
    assert (beside.strategy, beside.settings) == (
        "self_speculative", {"exit_layer": 1, "num_draft_tokens": 2, "n_gram_match": 3}
    )  # fmt: skip
    by_themselves = replace(tuning, verifications=[alone, both], confirmations=[alone])
    assert (by_themselves.defaults.strategy, by_themselves.defaults.settings) == ("n_gram", {"n_gram_match": 3})
    assert by_themselves.reason.startswith(
        "n_gram, n-grams of 3: the fastest of 2 settings run; n-grams of 3 confirmed"
    )
    assert by_themselves.advice == ""
    rows = verifications_table(by_themselves).rows
    assert [row[:3] for row in rows] == [("-", "-", "3"), ("1", "2", "3"), ("-", "-", "3")]
    slow = replace(by_themselves, verifications=[replace(alone, speedup=0.9)], confirmations=[])
    assert slow.reason.startswith("autoregressive: even n-grams of 3, the fastest of 1 settings run, measured 0.900x")
    exits = tuning_as_json(by_themselves)["exits"]
    assert [entry["best_with_n_grams"]["exit_layer"] for entry in exits] == [1, None]
    assert exits_table(by_themselves).rows[0][-1] == "3.00x"


def test_other_exits_are_stored_for_whoever_asks_for_the_policy_that_takes_them() -> None:
    tuning = make_tuning(1.2)
    predictions = [make_prediction(1, 2, 4.0), make_prediction(2, 1, 3.9), make_prediction(3, 1, 3.8)]
    chosen = make_run(predictions[0], 1.5)
    defaults = replace(tuning, predictions=predictions, verifications=[chosen], confirmations=[chosen]).defaults
    assert (defaults.draft_policy, defaults.draft_exits) == ("fixed", (2,))
    assert "draft_exits" not in defaults.settings


def test_exits_that_change_are_recommended_with_their_policy_and_named() -> None:
    tuning, setting = (
        make_tuning(1.2, 1.4),
        replace(make_prediction(1, 8, 3.0), draft_policy="dynamic", draft_exits=(3,)),
    )
    chosen = make_run(setting, 1.5)
    tuning = replace(tuning, verifications=[*tuning.verifications, chosen], confirmations=[chosen])
    assert tuning.defaults.settings == {
        "exit_layer": 1, "num_draft_tokens": 8, "draft_policy": "dynamic", "draft_exits": (3,)
    }  # fmt: skip
    said = "exit 1 or 3 with up to 8 drafts"
    assert tuning.reason.startswith(
        f"self_speculative, {said}: the fastest of 3 settings run; {said} confirmed, measured"
    )
    assert "predicted" not in tuning.reason  # since changing lengths are not
    row = dict(zip(verifications_table(tuning).columns, verifications_table(tuning).rows[2], strict=True))
    assert (row["exit"], row["drafts"], row["predicted"]) == ("1, 3", "to 8", "-")


@pytest.mark.parametrize(("size", "stored", "draft_head"), [(None, 64, 1.5), (16, 16, 0.5)])
def test_the_draft_vocabulary_is_recommended_with_the_exit_and_has_costs_of_its_own(
    size: int | None, stored: int, draft_head: float
) -> None:
    tuning = make_tuning(1.2)
    chosen = make_run(replace(make_prediction(1, 2, 4.0), draft_vocabulary_size=size), 1.5)
    agreement = replace(tuning.agreement, vocab_size=64, reduced={16: {1: [[False, False]]}})
    tuning = replace(
        tuning,
        agreement=agreement,
        draft_heads={16: 0.5},
        predictions=[*tuning.predictions, chosen.prediction],
        verifications=[*tuning.verifications, chosen],
        confirmations=[chosen],
    )
    assert (tuning.defaults.draft_vocabulary_size, tuning.defaults.draft_head) == (stored, draft_head)
    assert tuning.reason.startswith(f"self_speculative, exit 1 with 2 drafts{' of 16 ids' * (size == 16)}: the fastest")
    of_ids, share = ("16", "0.0%") if size else ("-", "50.0%")
    row = dict(zip(exits_table(tuning).columns, exits_table(tuning).rows[0], strict=True))
    assert (row.get("of ids", "-"), row["agreement"], row["best drafts"]) == (of_ids, share, "2")
    assert [row[2] for row in verifications_table(tuning).rows] == (["-", "16", "16"] if size else ["50.0%"] * 3)
    slow = replace(tuning, verifications=[replace(chosen, speedup=0.9)], confirmations=())
    assert f"the exit agrees with the full model on {share[:-3]}% of the tokens" in slow.reason
    assert (slow.defaults.draft_vocabulary_size, slow.defaults.draft_head) == (None, 0.5)


def test_a_lead_that_is_gone_when_run_again_is_not_recommended() -> None:
    tuning = make_tuning(1.003, 0.9, again=[(1, 1.01, 0.97)])
    assert tuning.defaults == DecodingDefaults(
        strategy="autoregressive", head=2.0, draft_head=1.5, first_extra=0.25, extra_token=0.05, overhead=0.5
    )
    assert tuning.reason.startswith(
        "autoregressive: no setting kept its lead when it was run again; exit 1 with 1 draft"
    )
    assert make_tuning(1.003, 0.9, again=[(1, 0.99, 1.0)]).defaults.strategy == "autoregressive"
    assert make_tuning(1.003, 0.9, again=[(1, 1.001, 1.0)]).defaults.strategy == "self_speculative"


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
    again = replace(make_tuning(2.75).verifications[0], **given)
    tuning = replace(make_tuning(2.75), confirmations=[again])
    assert tuning.defaults.strategy == "autoregressive"
    assert missing in tuning.shortfall
    assert bool(tuning.shortfall) == tuning.reason.startswith("none: ") == bool(missing)
    assert replace(tuning, confirmations=[make_run(again.prediction, 2.75)]).defaults.strategy == "self_speculative"


def test_nothing_measured_below_one_is_ever_recommended() -> None:
    tuning = make_tuning(0.7, 0.999)
    assert tuning.defaults.strategy == "autoregressive"
    assert tuning.reason.startswith("autoregressive: even exit 1 with 2 drafts")
    assert "agrees with the full model on 50% of the tokens; with 98%, one draft a round would gain" in tuning.reason
    dear = replace(tuning, costs=replace(COSTS, overhead=50.0))
    assert dear.reason.endswith("of the tokens; no share makes a draft gain here")
    cheap = replace(
        tuning, costs=replace(COSTS, head=0.0, draft_head=0.0, first_extra=0.0, extra_token=0.0, overhead=0.0)
    )
    assert needed_agreement(cheap.costs.cost_model(num_layers=2, exit_layer=1)) == 0.5
    assert "would gain" not in cheap.reason  # 50% would have been enough


def test_a_best_draft_length_at_the_edge_of_what_was_looked_at_is_told() -> None:
    def advice(*predicted: float) -> str:
        tuning = make_tuning(1.2, 1.1, 1.3, again=[(3, 1.3, 1.2)])
        return replace(tuning, predictions=[make_prediction(1, d, s) for d, s in enumerate(predicted, start=1)]).advice

    assert advice(1.0, 1.1, 1.2) == (
        "exit 1 is predicted to be fastest with 3 drafts, the most that was looked at: raise max_draft_tokens"
    )
    assert advice(1.0, 1.2, 1.1) == ""
    assert advice(1.0, 1.2, 1.2) == ""  # budgets allow no longer draft
