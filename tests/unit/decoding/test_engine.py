"""The loop's logic, on a fake decoder that counts: after t comes t + 1."""

import logging
from itertools import product
from typing import get_args

import pytest

from app.decoding.result import DecodingResult, Step
from app.decoding.sampling import SamplingSettings
from app.decoding.settings import DecodingSettings
from app.decoding.strategies import STRATEGIES, Strategy
from app.errors import ConfigError
from tests.support.decoding import decode
from tests.support.fake_decoder import FakeDecoder, counting_decoder


def _decode(
    decoder: FakeDecoder, prompt: list[int], strategy: Strategy = "self_speculative", **settings: object
) -> DecodingResult:
    needed = {
        "exit_layer": 2,
        "num_draft_tokens": 4,
        "skipped_layers": (1, 2),
        "draft_decoder": counting_decoder(max_length=decoder.max_length),
        "n_gram_match": 2,
    }
    chosen = {name: value for name, value in needed.items() if name in STRATEGIES[strategy].needs}
    decoder.may_skip = strategy == "layer_skip"
    merged = DecodingSettings(**({"max_new_tokens": 12} | chosen | settings))  # type: ignore[arg-type]
    return decode(decoder, prompt, strategy=strategy, settings=merged)


def test_every_strategy_of_the_literal_is_in_the_table_and_counts() -> None:
    assert set(get_args(Strategy)) == set(STRATEGIES)
    for strategy in STRATEGIES:
        assert _decode(counting_decoder(), [3], strategy).tokens == list(range(4, 16))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_budget_is_met_exactly(strategy: Strategy) -> None:
    for budget in (0, 1, 2, 5, 6, 7):
        result = _decode(counting_decoder(misses=(6,)), [3], strategy, max_new_tokens=budget)
        assert len(result.tokens) == budget
        assert result.stop_reason == "max_new_tokens"


def test_a_budget_of_two_leaves_nothing_to_draft_and_takes_a_plain_step() -> None:
    result = _decode(counting_decoder(), [3], max_new_tokens=2)
    assert (result.tokens, result.rounds, result.drafted) == ([4, 5], 1, 0)
    assert result.acceptance_rate is None


def test_nothing_runs_and_nothing_is_divided_by_for_a_budget_of_zero() -> None:
    result = _decode(counting_decoder(), [3], max_new_tokens=0)
    assert result.tokens == []
    assert (result.tokens_per_second, result.acceptance_rate, result.mean_tokens_per_round) == (None, None, None)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_context_ends_decoding_in_the_middle_of_a_draft(strategy: Strategy) -> None:
    result = _decode(
        counting_decoder(max_length=9), [1, 2, 3], strategy, max_new_tokens=50
    )  # the fake checks positions
    assert result.tokens == [4, 5, 6, 7, 8, 9]
    assert result.stop_reason == "context_length"


def test_a_prompt_that_fills_the_context_yields_nothing() -> None:
    result = _decode(counting_decoder(max_length=3), [1, 2, 3])
    assert (result.tokens, result.stop_reason) == ([], "context_length")


@pytest.mark.parametrize("strategy", ["autoregressive", "self_speculative"])
def test_an_eos_ends_the_output_wherever_it_was_drafted_or_verified(strategy: Strategy) -> None:
    for misses, first_eos in product([(), (4,), (5,), (6,), (4, 5, 6, 7)], range(4, 11)):
        result = _decode(counting_decoder(misses=misses), [3], strategy, eos_token_ids=(first_eos,))
        assert result.tokens == list(range(4, first_eos + 1)), (misses, first_eos)
        assert result.stop_reason == "eos"


def test_of_several_eos_ids_the_earliest_position_wins_not_the_first_listed() -> None:
    assert _decode(counting_decoder(), [3], eos_token_ids=(8, 6, 40)).tokens == [4, 5, 6]


def test_an_eos_after_a_drafted_eos_is_not_taken() -> None:
    assert _decode(counting_decoder(), [3], eos_token_ids=(6, 7)).tokens == [4, 5, 6]  # 7 is the full model's bonus


def test_nothing_is_drafted_after_an_eos() -> None:
    result = _decode(counting_decoder(), [3], eos_token_ids=(6,), num_draft_tokens=8)
    assert (result.drafted, result.accepted) == (2, 2)


def test_what_an_n_gram_found_ends_with_an_eos() -> None:
    result = _decode(counting_decoder(), [3, 4, 5, 6, 7, 2], "n_gram", n_gram_match=1, eos_token_ids=(5,))
    assert (result.tokens, result.drafted, result.accepted) == ([3, 4, 5], 2, 2)


def test_an_eos_that_the_full_model_rejects_does_not_end_the_output() -> None:
    result = _decode(counting_decoder(misses=(5,)), [3], eos_token_ids=(7,))  # after 5 the exit says 7
    assert result.tokens == [4, 5, 6, 7]


def test_tokens_are_streamed_as_rounds_settle_them() -> None:
    streamed: list[Step] = []
    settings = DecodingSettings(max_new_tokens=8, exit_layer=1, num_draft_tokens=2, eos_token_ids=(10,))
    result = decode(counting_decoder(), [3], strategy="self_speculative", settings=settings, on_step=streamed.append)
    assert streamed == [Step([4]), Step([5, 6, 7], 2), Step([8, 9, 10], 2)]
    assert [token for step in streamed for token in step.tokens] == result.tokens


def test_times_are_split_at_the_first_token() -> None:
    result = _decode(counting_decoder(), [3])
    assert result.seconds_prefill > 0
    assert result.tokens_per_second == pytest.approx(11 / result.seconds_decode)


@pytest.mark.parametrize(
    ("prompt", "strategy", "settings", "message"),
    [
        ([], "autoregressive", {}, "prompt_tokens: got .*at least one token"),
        ([1] * 65, "autoregressive", {}, "prompt_tokens: got '65 tokens', allowed at most 64"),
        ([1, 50], "autoregressive", {}, r"prompt_tokens: got 50, allowed \[0, 49\]"),
        ([-1], "autoregressive", {}, "prompt_tokens: got -1"),
        ([1], "autoregressive", {"eos_token_ids": (50,)}, "eos_token_ids: got 50"),
        ([1], "self_speculative", {"exit_layer": 4}, r"exit_layer: got 4, allowed \[1, 3\]; 4 is the full model"),
        ([1], "self_speculative", {"exit_layer": 0}, "exit_layer: got 0"),
        ([1], "self_speculative", {"exit_layer": None}, "exit_layer: got None"),
        (
            [1],
            "self_speculative",
            {"draft_policy": "dynamic", "draft_exits": (4,)},
            "draft_exits: got 4, allowed .1, 3.",
        ),
        (
            [1],
            "self_speculative",
            {"draft_policy": "dynamic", "engine": "static"},
            "allowed dynamic with draft_policy dynamic",
        ),
        ([1], "layer_skip", {"draft_policy": "dynamic"}, "draft_policy: got dynamic, allowed fixed | adaptive | off"),
        ([1], "self_speculative", {"num_draft_tokens": 0}, "num_draft_tokens: got 0"),
        ([1], "self_speculative", {"n_gram_match": 0}, "n_gram_match: got 0.*leave it out"),
        ([1], "n_gram", {"n_gram_match": None}, "n_gram_match: got None, allowed a value, with strategy n_gram"),
        ([1], "n_gram", {"n_gram_max_drafts": 0}, "n_gram_max_drafts: got 0"),
        ([1], "early_exit", {"exit_layer": 5}, r"exit_layer: got 5, allowed \[1, 4\]"),
        ([1], "autoregressive", {"max_new_tokens": -1}, "max_new_tokens: got -1"),
        ([1], "autoregressive", {"sampling": SamplingSettings(temperature=1.0)}, "generators: got None"),
    ],
)
def test_what_cannot_be_decoded_is_named(
    prompt: list[int], strategy: Strategy, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _decode(counting_decoder(), prompt, strategy, **settings)


def test_an_unknown_strategy_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"strategy: got 'beam', allowed autoregressive \| early_exit"):
        decode(counting_decoder(), [1], strategy="beam", settings=DecodingSettings(max_new_tokens=1))  # type: ignore[arg-type]


def test_a_setting_the_strategy_does_not_use_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        result = _decode(counting_decoder(), [1], "autoregressive", exit_layer=2, num_draft_tokens=4, n_gram_match=2)
        _decode(counting_decoder(), [1], n_gram_match=2)
        _decode(counting_decoder(), [1], "n_gram", draft_policy="off")
        _decode(counting_decoder(), [1], draft_exits=(2,))
    assert "exit_layer=2 has no effect with strategy autoregressive" in caplog.text
    assert "num_draft_tokens=4 has no effect with strategy autoregressive" in caplog.text
    assert "n_gram_match=2 has no effect with strategy autoregressive" in caplog.text
    assert "draft_exits=[2] has no effect with draft_policy fixed" in caplog.text
    assert len(caplog.records) == 4
    assert (result.num_tokens, result.drafted) == (12, 0)
