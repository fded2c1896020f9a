import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, get_args

import pytest
from transformers import LlamaForCausalLM

from app.benchmark import benchmark
from app.benchmark.alternation import Contender
from app.benchmark.benchmark import (
    BENCHMARK_STRATEGIES,
    BenchmarkSettings,
    BenchmarkStrategy,
    Subject,
    build_contenders,
    run_benchmark,
)
from app.benchmark.decoding_costs import DecodingCosts
from app.decoding.strategies import STRATEGIES
from app.errors import ConfigError
from app.spans.decoder import SpanDecoder
from tests.support.tiny_models import tiny_llama

COSTS = DecodingCosts(block_seconds=1e-3, head=2.0, draft_head=2.0, first_extra=0.0, extra_token=0.05, overhead=0.5)
PROMPTS = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10, 11]]


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama(tied=False)


@pytest.fixture
def subject(model: LlamaForCausalLM) -> Subject:
    small = tiny_llama(seed=1, num_layers=2, tied=False)
    return Subject(model, SpanDecoder(model), SpanDecoder(small))


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What costs were asked for; they are made up."""
    asked: list[dict[str, Any]] = []

    def measure(decoder: SpanDecoder, **options: int) -> DecodingCosts:
        asked.append({"num_layers": decoder.num_layers, **options})
        return COSTS

    monkeypatch.setattr(benchmark, "measure_decoding_costs", measure)
    return asked


def _settings(*strategies: BenchmarkStrategy, **options: Any) -> BenchmarkSettings:
    defaults: dict[str, Any] = {"max_new_tokens": 8, "repeats": 1}
    return BenchmarkSettings(strategies=strategies, **(defaults | options))


def _names(contenders: Sequence[Contender]) -> list[tuple[str, int | None, int | None]]:
    return [(each.strategy, each.settings.exit_layer, each.settings.num_draft_tokens) for each in contenders]


def test_every_strategy_of_the_engine_can_be_benchmarked_and_two_of_transformers() -> None:
    assert list(BENCHMARK_STRATEGIES) == [*STRATEGIES, "transformers", "transformers_early_exit"]
    assert {strategy for part in get_args(BenchmarkStrategy) for strategy in (get_args(part) or (part,))} == set(
        BENCHMARK_STRATEGIES
    )


def test_each_strategy_is_measured_with_all_the_exits_and_drafts_it_takes(subject: Subject) -> None:
    settings = _settings(
        *BENCHMARK_STRATEGIES, exit_layers=(1, 3), num_draft_tokens=(2, 5), skipped_layers=(1,), n_gram_match=(2, 4)
    )
    contenders = build_contenders(subject, settings)
    plain = [each for each in contenders if each.settings.n_gram_match is None]
    for match in (2, 4):  # whatever our engine drafts, with each of these and without
        own = [each for each in contenders if each.settings.n_gram_match == match]
        drafting = [name for name in _names(plain) if name[2] is not None and name[0] != "transformers_early_exit"]
        assert _names(own) == [*drafting, ("n_gram", None, None)]
        assert own[-1].label == f"n_gram, n-grams of {match}"
    both = [(exit_layer, drafts) for exit_layer in (1, 3) for drafts in (2, 5)]
    assert _names(plain) == [
        ("autoregressive", None, None),
        *(("early_exit", exit_layer, None) for exit_layer in (1, 3)),
        *(("self_speculative", *pair) for pair in both),
        *(("draft_model", None, drafts) for drafts in (2, 5)),
        *(("layer_skip", None, drafts) for drafts in (2, 5)),
        ("transformers", None, None),
        *(("transformers_early_exit", *pair) for pair in both),
    ]


def test_autoregressive_decoding_comes_first_whether_asked_for_or_not_and_nothing_is_measured_twice(
    subject: Subject,
) -> None:
    asked = _settings("early_exit", "autoregressive", "early_exit", exit_layers=(2, 4, 2))
    expected = [("autoregressive", None, None), ("early_exit", 2, None), ("early_exit", 4, None)]
    assert _names(build_contenders(subject, asked)) == expected
    assert _names(build_contenders(subject, _settings("early_exit", exit_layers=(2, 4)))) == expected


SPECULATIVE: Any = {"exit_layers": (2,), "num_draft_tokens": (3,)}
REFUSED: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
    (("autoregressive",), {"batch_size": 0}, "batch_size: got 0"),
    (("transformers_early_exit",), {"exit_layers": (2,)}, r"num_draft_tokens: got \[\]"),
    (("early_exit",), {}, r"exit_layers: got \[\]"),
    (("early_exit",), {"exit_layers": (5,)}, r"exit_layers: got 5, allowed \[1, 4\]"),
    *(
        ((strategy,), SPECULATIVE | {"exit_layers": (2, wrong)}, rf"exit_layers: got {wrong}, allowed \[1, 3\]")
        for strategy in ("self_speculative", "transformers_early_exit")
        for wrong in (0, 4)
    ),
    (("self_speculative",), SPECULATIVE | {"num_draft_tokens": (2, 0)}, "num_draft_tokens: got 0"),
    (("self_speculative",), SPECULATIVE | {"draft_policy": "some"}, "draft_policy: got 'some'"),
    (("self_speculative",), SPECULATIVE | {"draft_policy": ()}, r"draft_policy: got \[\], allowed at least one"),
    (("layer_skip",), SPECULATIVE | {"skipped_layers": (1,), "draft_policy": "dynamic"}, "draft_policy: got 'dynamic'"),
    (("layer_skip",), {"num_draft_tokens": (3,), "skipped_layers": (4,)}, "skipped_layers: got"),
    (("n_gram",), {}, r"n_gram_match: got \[\], allowed at least one, with strategy n_gram"),
    (("n_gram",), {"n_gram_match": (0,)}, "n_gram_match: got 0"),
    (("self_speculative",), SPECULATIVE | {"n_gram_match": (1,), "n_gram_max_drafts": 0}, "n_gram_max_drafts: got 0"),
]


@pytest.mark.parametrize(("strategies", "options", "message"), REFUSED)
def test_what_cannot_be_benchmarked_is_refused_before_anything_runs(
    subject: Subject,
    monkeypatch: pytest.MonkeyPatch,
    strategies: tuple[Any, ...],
    options: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(SpanDecoder, "run_blocks", lambda *_, **__: pytest.fail("a block ran"))
    with pytest.raises(ConfigError, match=message):
        run_benchmark(subject, PROMPTS, _settings(*strategies, **options))


def test_a_model_to_draft_is_asked_for_by_the_users_name_for_it(subject: Subject) -> None:
    settings = _settings("draft_model", num_draft_tokens=(2,))
    with pytest.raises(ConfigError, match="draft_model: got None"):
        build_contenders(subject._replace(draft_decoder=None), settings)
    other = SpanDecoder(tiny_llama(vocab_size=60))
    with pytest.raises(ConfigError, match="draft_model: got 'vocabulary of 60'"):
        build_contenders(subject._replace(draft_decoder=other), settings)


def test_no_prompts_are_refused(subject: Subject) -> None:
    with pytest.raises(ConfigError, match="prompts"):
        run_benchmark(subject, [], _settings("autoregressive"))


def test_an_option_that_no_strategy_takes_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        _settings(
            *("early_exit", "transformers", "transformers_early_exit"),
            **{"exit_layers": (2,), "num_draft_tokens": (3,), "skipped_layers": (1,), "n_gram_match": (3,)},
        )
    assert [record.getMessage() for record in caplog.records] == [
        "skipped_layers=[1] has no effect with these strategies",
        "n_gram_match=[3] has no effect with these strategies",
    ]


def test_prompts_are_cut_into_batches_in_their_order_and_all_give_the_same_tokens(
    subject: Subject, costs: list[dict[str, Any]]
) -> None:
    strategies = ("self_speculative", "draft_model", "layer_skip", "transformers")
    options = SPECULATIVE | {"skipped_layers": (1,), "batch_size": 3}
    done: list[int] = []
    measured = run_benchmark(subject, PROMPTS, _settings(*strategies, **options), on_batch=done.append)
    assert done == [1, 2]
    one_by_one = run_benchmark(subject, PROMPTS, _settings("autoregressive")).measurements[0]
    expected = [result.tokens for result in one_by_one.results]
    for measurement in measured.measurements:
        assert [len(batch[0]) for batch in measurement.runs] == [3, 1]
        assert [result.tokens for result in measurement.results] == expected


def test_a_time_limit_leaves_out_prompts_but_for_the_first_four(subject: Subject) -> None:
    for limit, expected in ((0.0, 4), (3600.0, 6), (None, 6)):
        settings = _settings("autoregressive", max_new_tokens=2, time_limit_seconds=limit)
        measured = run_benchmark(subject, PROMPTS + PROMPTS[:2], settings)
        assert [len(each.results) for each in measured.measurements] == [expected]
        assert [each.num_prompts for each in measured.differences] == [expected]


def test_costs_are_fitted_to_the_batches_and_drafts_asked_for(subject: Subject, costs: list[dict[str, Any]]) -> None:
    settings = _settings("self_speculative", **SPECULATIVE | {"num_draft_tokens": (3, 9), "batch_size": 3})
    assert run_benchmark(subject, PROMPTS, settings).costs == (COSTS, COSTS)
    asked = {"batch_size": 3, "context_length": 11 // 4 + 8 // 2, "max_positions": 10, "repeats": 2}
    assert costs == [{"num_layers": layers, **asked} for layers in (4, 2)] * 3  # before, and after each of two batches
    costs.clear()
    run_benchmark(subject, PROMPTS, _settings("n_gram", n_gram_match=(1,), n_gram_max_drafts=6))
    assert costs[0]["max_positions"] == 7


def test_costs_are_measured_before_and_four_times_between_batches(
    subject: Subject, costs: list[dict[str, Any]]
) -> None:
    done: list[tuple[int, int]] = []
    settings = _settings("self_speculative", **SPECULATIVE)
    alone = subject._replace(draft_decoder=None)
    run_benchmark(alone, PROMPTS * 2 + PROMPTS[:2], settings, on_batch=lambda batch: done.append((batch, len(costs))))
    assert done == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (6, 3), (7, 3), (8, 4), (9, 4), (10, 5)]


def test_a_busy_moment_of_the_machine_does_not_decide_the_costs(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = DecodingCosts(block_seconds=9.0, head=0.0, draft_head=0.0, first_extra=0.0, extra_token=0.9, overhead=90.0)
    moments = iter([COSTS, busy, replace(COSTS, head=2.5), COSTS, COSTS])
    monkeypatch.setattr(benchmark, "measure_decoding_costs", lambda *_, **__: next(moments))
    settings = _settings("self_speculative", **SPECULATIVE)
    measured = run_benchmark(subject._replace(draft_decoder=None), PROMPTS, settings)
    assert measured.costs == (COSTS, None)
    assert next(moments, None) is None


@pytest.mark.parametrize("strategy", ["autoregressive", "early_exit", "transformers", "transformers_early_exit"])
def test_no_costs_are_measured_where_the_engine_drafts_nothing(
    subject: Subject, costs: list[dict[str, Any]], strategy: BenchmarkStrategy
) -> None:
    assert run_benchmark(subject, PROMPTS[:1], _settings(strategy, **SPECULATIVE)).costs is None
    assert costs == []


def test_measured_costs_policy_and_falling_back_reach_the_engine(
    subject: Subject, costs: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, dict[str, Any]]] = []
    real = benchmark.engine_contender
    monkeypatch.setattr(
        benchmark, "engine_contender", lambda d, name, s: (seen.append((name, asdict(s))), real(d, name, s))[1]
    )
    options = SPECULATIVE | {"draft_policy": "adaptive", "fall_back": True, "eos_token_ids": (5,)}
    run_benchmark(subject._replace(draft_decoder=None), PROMPTS[:1], _settings("self_speculative", **options))
    (plain, plain_settings), (speculative, settings) = seen[-2:]  # the first two were a check
    assert (plain, speculative) == ("autoregressive", "self_speculative")
    assert settings["costs"] == asdict(COSTS.cost_model(num_layers=4, exit_layer=2))
    assert (settings["draft_policy"], settings["fall_back"], settings["eos_token_ids"]) == ("adaptive", True, (5,))
    assert (plain_settings["draft_policy"], plain_settings["costs"]) == ("fixed", None)


def test_each_policy_is_measured_with_every_exit_and_dynamic_with_all_of_them_together(subject: Subject) -> None:
    options = SPECULATIVE | {"exit_layers": (2, 1), "draft_policy": ("fixed", "dynamic")}
    everyone = build_contenders(subject._replace(draft_decoder=None), _settings("self_speculative", **options))
    found = [(each.settings.draft_policy, each.settings.candidate_exits) for each in everyone]
    assert found == [("fixed", ()), ("fixed", (2,)), ("fixed", (1,)), ("dynamic", (2, 1))]


def test_a_model_too_small_to_fit_costs_to_is_still_benchmarked() -> None:
    model = tiny_llama(num_layers=1, tied=False)
    subject = Subject(model, SpanDecoder(model), SpanDecoder(tiny_llama(num_layers=1, tied=False)))
    measured = run_benchmark(subject, PROMPTS[:1], _settings("draft_model", num_draft_tokens=(3,)))
    assert measured.costs is None
    assert measured.measurements[1].counts.acceptance_rate == 1.0  # it drafts for itself
