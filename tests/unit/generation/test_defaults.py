"""What a user left open, filled in and said: from `layerskip tune` as far as it applies here."""

import logging
from dataclasses import asdict, replace

import pytest
import torch

from app.decoding.cost_model import CostModel
from app.decoding.settings import DecodingSettings
from app.errors import ConfigError
from app.generation.defaults import choose_decoding
from app.generation.loaded_model import LoadedModel
from app.model_files.decoding_defaults import Conditions, DecodingDefaults
from app.spans.decoder import SpanDecoder
from tests.support.tiny_models import tiny_llama

MODEL = tiny_llama(num_layers=8)
HERE = Conditions(dtype="float32", device_type="cpu", threads=2)
TUNED = DecodingDefaults(
    strategy="self_speculative",
    exit_layer=3,
    num_draft_tokens=5,
    head=2.0,
    draft_head=1.0,
    first_extra=0.5,
    extra_token=0.5,
    overhead=0.25,
    measured_speedup=1.25,
    conditions=HERE,
)
SETTING = "exit_layer 3 and num_draft_tokens 5"


@pytest.fixture
def choose(caplog, monkeypatch):
    """What is chosen, and what was said."""

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def run(strategy=None, *, tuned=TUNED, batch_size=1, n_grams=True, **settings):
        stored = None if tuned is None else asdict(tuned)
        monkeypatch.setattr(MODEL.generation_config, "layerskip", stored, raising=False)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            chosen = choose_decoding(
                strategy,
                DecodingSettings(max_new_tokens=4, **settings),
                LoadedModel(MODEL, None, SpanDecoder(MODEL)),
                batch_size=batch_size,
                n_grams=n_grams,
            )
        return *chosen, caplog.text

    return run


def test_under_the_conditions_of_tuning_all_of_it_is_used(choose):
    strategy, settings, said = choose()
    assert (strategy, settings.exit_layer, settings.num_draft_tokens) == ("self_speculative", 3, 5)
    assert settings.costs == CostModel.self_speculative(
        num_layers=8, exit_layer=3, head=2.0, draft_head=1.0, first_extra=0.5, extra_token=0.5, overhead=0.25
    )
    assert f"(tuned); layerskip tune measured a speedup of 1.25 with {SETTING}" in said
    assert "here" not in said


@pytest.mark.parametrize(
    ("changes", "said_of_both"),
    [
        ({"dtype": "bfloat16"}, "bfloat16 on cpu with 2 threads; here float32"),
        ({"device_type": "cuda", "threads": None}, "float32 on cuda; here cpu"),
        ({"threads": 99}, "float32 on cpu with 99 threads; here 2 threads"),
    ],
)
def test_under_other_conditions_exit_and_drafts_are_still_taken_but_not_the_costs(choose, changes, said_of_both):
    strategy, settings, said = choose(
        tuned=replace(TUNED, conditions=replace(HERE, **changes)), draft_policy="adaptive"
    )
    assert (strategy, settings.exit_layer, settings.num_draft_tokens) == ("self_speculative", 3, 5)
    assert settings.costs is None
    assert f"; it was tuned for {said_of_both}" in said


def test_the_tuned_policy_is_taken_with_its_exit_and_another_where_that_cannot_be(choose):
    tuned = replace(TUNED, draft_policy="dynamic", draft_exits=(2, 6))
    _, settings, said = choose(tuned=tuned)
    assert (settings.policy, settings.candidate_exits) == ("dynamic", (3, 2, 6))
    assert f"speedup of 1.25 with {SETTING} and draft_policy dynamic and draft_exits (2, 6)" in said
    _, settings, said = choose(tuned=tuned, exit_layer=4)
    assert (settings.policy, settings.candidate_exits) == ("fixed", (4,))
    _, settings, said = choose(tuned=tuned, draft_policy="fixed")
    assert (settings.policy, settings.candidate_exits) == ("fixed", (3,))
    assert "layerskip tune chose otherwise" in said
    _, settings, said = choose(tuned=replace(tuned, n_gram_match=2), engine="static")
    assert (settings.policy, settings.n_gram_match) == ("adaptive", None)
    _, settings, said = choose(tuned=replace(TUNED, draft_exits=(6, 1)), draft_policy="dynamic")
    assert settings.candidate_exits == (3, 6, 1)
    assert "draft_exits [6, 1] (tuned)" in said
    _, settings, said = choose(tuned=None, draft_policy="dynamic")  # a quarter of eight blocks, half and twice as many
    assert settings.candidate_exits == (2, 1, 4)
    assert "draft_exits [1, 4] (untuned)" in said


def test_a_batch_is_another_condition(choose):
    _, settings, said = choose(batch_size=4)
    assert settings.costs is None
    assert "; here batches of 4" in said


@pytest.mark.parametrize("here", [None, range(3), range(7)])
def test_another_draft_vocabulary_is_another_condition(choose, monkeypatch, here):
    monkeypatch.setattr(SpanDecoder, "draft_vocabulary", here)
    _, settings, said = choose(tuned=replace(TUNED, draft_vocabulary_size=7))
    size = len(here or range(MODEL.config.vocab_size))
    assert (settings.costs is None) == (size != 7)
    assert (f"; it was tuned with drafts from 7 token ids; here they are from {size}" in said) == (size != 7)


def test_a_file_that_notes_no_conditions_is_used_as_before(choose):
    _, settings, said = choose(tuned=replace(TUNED, conditions=None))
    assert settings.costs.extra_token == 0.5
    assert "here" not in said


@pytest.mark.parametrize(
    ("strategy", "given"),
    [
        (None, {"exit_layer": 2}),
        (None, {"num_draft_tokens": 2}),
        ("layer_skip", {"skipped_layers": (4,)}),
        ("early_exit", {}),
    ],
)
def test_a_speedup_is_not_claimed_for_what_was_not_tuned(choose, strategy, given):
    *_, said = choose(strategy, **given)
    assert "measured" not in said
    assert f"layerskip tune chose otherwise: self_speculative with {SETTING}" in said


@pytest.mark.parametrize(
    ("tuned", "strategy", "given", "expected"),
    [
        (replace(TUNED, n_gram_match=2), None, {}, ("self_speculative", 2)),
        (replace(TUNED, n_gram_match=2), None, {"n_gram_match": 5}, ("self_speculative", 5)),
        (replace(TUNED, n_gram_match=2), None, {"n_grams": False}, ("self_speculative", None)),
        (replace(TUNED, n_gram_match=2), None, {"exit_layer": 2}, ("self_speculative", None)),  # tuned for another exit
        (TUNED, None, {}, ("self_speculative", None)),
        (TUNED, None, {"n_gram_match": 5}, ("self_speculative", 5)),
        (TUNED, "n_gram", {}, ("n_gram", 3)),
        (DecodingDefaults(strategy="n_gram", n_gram_match=2), None, {}, ("n_gram", 2)),
        (DecodingDefaults(strategy="autoregressive"), None, {}, ("autoregressive", None)),
        (DecodingDefaults(strategy="autoregressive"), None, {"n_gram_match": 5}, ("n_gram", 5)),
        (None, None, {"n_gram_match": 5}, ("self_speculative", 5)),
    ],
)
def test_n_grams_draft_where_that_was_tuned_or_is_asked_for(choose, tuned, strategy, given, expected):
    chosen, settings, said = choose(strategy, tuned=tuned, **given)
    assert (chosen, settings.n_gram_match) == expected
    assert ("n_gram_match" in said.split(";")[0]) == (expected[1] not in (None, 5))


@pytest.mark.parametrize(
    ("given", "most"),
    [
        ({}, 5),
        ({"n_gram_match": 2}, 5),
        ({"n_gram_match": 4}, None),  # for which the length was not tuned
        ({"n_gram_max_drafts": 7}, 7),
        ({"n_grams": False}, None),
    ],
)
def test_the_tuned_length_of_drafts_goes_with_the_tuned_n_grams(choose, given, most):
    _, settings, said = choose(None, tuned=replace(TUNED, n_gram_match=2, n_gram_max_drafts=5), **given)
    assert settings.n_gram_max_drafts == most
    assert ("n_gram_max_drafts 5 (tuned)" in said) == (most == 5)


def test_costs_that_were_measured_hold_for_n_grams_alone(choose):
    tuned = DecodingDefaults(
        strategy="n_gram", n_gram_match=2, head=2.0, extra_token=0.5, overhead=0.25, first_extra=0.5
    )
    costs = choose(tuned=tuned)[1].costs
    assert (costs.plain_step, costs.round_cost(2)) == (10, 10 * 2 + 0.25 + 5)


def test_nothing_is_said_where_nothing_is_left_open(choose):
    assert choose("self_speculative", exit_layer=2, num_draft_tokens=2)[-1] == ""
    assert choose("autoregressive")[-1] == ""


def test_a_model_that_was_not_tuned_or_gains_nothing_says_so(choose):
    assert "layerskip tune finds what is fastest" in choose(tuned=None)[-1]
    strategy, settings, said = choose(tuned=DecodingDefaults(strategy="autoregressive", head=1.0, extra_token=0.1))
    assert (strategy, settings.exit_layer, settings.costs) == ("autoregressive", None, None)
    assert "layerskip tune found no setting that is faster" in said


@pytest.mark.parametrize(
    ("strategy", "given", "message"),
    [
        (None, {"exit_layer": 99}, "exit_layer: got 99"),
        ("early_exit", {"exit_layer": 9}, "exit_layer: got 9"),
        ("layer_skip", {}, "skipped_layers: got None"),
        ("layer_skip", {"skipped_layers": (8,)}, "skipped_layers: got"),
        ("layer_skip", {"skipped_layers": (1,), "draft_policy": "dynamic"}, "draft_policy: got 'dynamic'"),
        (None, {"draft_policy": "dynamic", "draft_exits": (99,)}, "draft_exits: got 99"),
        (None, {"engine": "static", "n_gram_match": 2}, "engine: got 'static', allowed dynamic with n_gram_match"),
        ("n_gram", {"engine": "static"}, "engine: got 'static', allowed dynamic with strategy n_gram"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_said(choose, caplog, strategy, given, message):
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        choose(strategy, **given)
    assert caplog.text == ""


def test_what_has_no_effect_is_left_to_the_engine_to_warn_of(choose):
    assert "no effect" not in choose("autoregressive", exit_layer=2, draft_policy="adaptive")[-1]
    assert "num_draft_tokens 3 (untuned)" in choose("draft_model", tuned=None)[-1]  # its model comes later


def test_a_model_of_one_block_is_decoded_autoregressively_and_drafts_with_it_are_refused(caplog):
    single = tiny_llama(num_layers=1)
    loaded = LoadedModel(single, None, SpanDecoder(single))
    with caplog.at_level(logging.INFO):
        assert choose_decoding(None, DecodingSettings(max_new_tokens=4), loaded)[0] == "autoregressive"
        given = DecodingSettings(max_new_tokens=4, n_gram_match=2)
        assert choose_decoding(None, given, loaded)[0] == "n_gram"
    assert caplog.messages == [
        f"strategy {name}: a model of one block has no earlier exit" for name in ("autoregressive", "n_gram")
    ]
    for settings in ({"num_draft_tokens": 2}, {"exit_layer": 1}):
        assert choose_decoding(None, DecodingSettings(max_new_tokens=4, **settings), loaded)[0] == "autoregressive"
    for strategy in ("self_speculative", "layer_skip"):
        with pytest.raises(ConfigError, match=r"strategy: got .*allowed autoregressive, for a model of one block"):
            choose_decoding(strategy, DecodingSettings(max_new_tokens=4), loaded)
