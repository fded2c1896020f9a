"""Prompts decoded together come out, in every particular, as each would alone."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from app.decoding.engine import Decoding, decode_batch
from app.decoding.result import DecodingResult, Step
from app.decoding.sampling import SamplingSettings
from app.decoding.settings import DecodingSettings, Ends
from app.decoding.strategies import STRATEGIES
from app.spans.kv_cache import KeyValueCache
from tests.support.decoding import decode
from tests.unit.decoding.circumstances import HostileClock, ends_after
from tests.unit.decoding.model_zoo import (
    CONTEXT,
    NAMES,
    VOCAB,
    LimitedDecoder,
    decoder_named,
    decoder_with_exit_blocks,
    draft_decoder,
    prompt_of,
)

_LENGTHS = (9, 1, 30, 12, 4)
_NEEDED: dict[str, dict[str, Any]] = {
    "autoregressive": {},
    "early_exit": {"exit_layer": 1},
    "self_speculative": {"exit_layer": 1, "num_draft_tokens": 4},
    "draft_model": {"draft_decoder": None, "num_draft_tokens": 4},
    "layer_skip": {"skipped_layers": (1,), "num_draft_tokens": 4},
    "n_gram": {"n_gram_match": 1},
}
_SAMPLING = SamplingSettings(temperature=0.9, top_k=30, top_p=0.95, min_p=0.01)


def _settings(strategy: str, **changed: Any) -> DecodingSettings:
    needed = dict(_NEEDED[strategy])
    if strategy == "draft_model":
        needed["draft_decoder"] = draft_decoder(2, VOCAB + 9)
    return DecodingSettings(**({"max_new_tokens": 20} | needed | changed))


def _generators(settings: DecodingSettings, count: int) -> list[torch.Generator] | None:
    return None if settings.sampling.greedy else [torch.Generator().manual_seed(seed) for seed in range(count)]


def _together_and_alone(
    decoder: LimitedDecoder, prompts: Sequence[list[int]], strategy: Any, settings: DecodingSettings, limit: int
) -> tuple[list[DecodingResult], list[DecodingResult]]:
    decoder.limit = limit
    generators = _generators(settings, len(prompts))
    together = decode_batch(decoder, prompts, strategy=strategy, settings=settings, generators=generators)
    generators = _generators(settings, len(prompts)) or [None] * len(prompts)  # type: ignore[list-item]
    alone = [
        decode(decoder, prompt, strategy=strategy, settings=settings, generator=generator)
        for prompt, generator in zip(prompts, generators, strict=True)
    ]
    return together, alone


def _told(result: DecodingResult) -> tuple[list[int], str, tuple[Step, ...], int | None]:
    """Everything but times; the steps hold rounds, drafted and accepted."""
    return result.tokens, result.stop_reason, result.steps, result.fell_back_after


@pytest.mark.parametrize("name", NAMES)
def test_a_greedy_batch_equals_its_prompts_alone_whatever_the_model(name: str) -> None:
    prompts, own = [prompt_of(length) for length in _LENGTHS[:4]], decoder_with_exit_blocks(name)
    last, few = own.own_exits[-1], range(1, VOCAB, 2)
    for decoder, vocabulary, changed in (
        (decoder_named(name), None, {}),
        (own, None, {}),
        (own, few, {"exit_layer": last, "n_gram_match": 1}),
        (own, few, {"exit_layer": last, "engine": "static"}),
    ):
        decoder.use_draft_vocabulary(vocabulary)
        settings = _settings("self_speculative", max_new_tokens=14, **changed)
        together, alone = _together_and_alone(decoder, prompts, "self_speculative", settings, CONTEXT)
        assert [_told(result) for result in together] == [_told(result) for result in alone]
    own.use_draft_vocabulary(None)


@pytest.mark.parametrize(
    ("name", "strategy", "policy"),
    [
        ("llama whose exits agree", "autoregressive", "fixed"),
        ("llama whose exits agree", "self_speculative", "fixed"),
        ("llama whose exits agree", "self_speculative", "adaptive"),
        ("mistral with a window", "draft_model", "adaptive"),
        ("olmo2 by modules", "layer_skip", "adaptive"),
    ],
)
def test_a_sampled_batch_equals_its_prompts_alone_with_the_same_generators(
    name: str, strategy: str, policy: str
) -> None:
    prompts = [prompt_of(length) for length in _LENGTHS[:3]]
    settings = _settings(strategy, sampling=_SAMPLING, draft_policy=policy, fall_back=policy == "adaptive")
    together, alone = _together_and_alone(decoder_named(name), prompts, strategy, settings, CONTEXT)
    assert [_told(result) for result in together] == [_told(result) for result in alone]
    assert len({tuple(result.tokens) for result in together}) == len(prompts)


@pytest.mark.parametrize(
    ("strategy", "sampling", "engine"),
    [
        *((strategy, _SAMPLING, "dynamic") for strategy in STRATEGIES),
        *((strategy, SamplingSettings(), "dynamic") for strategy in list(STRATEGIES)[2:4]),
        *((strategy, _SAMPLING, "static") for strategy in list(STRATEGIES)[:3]),
        ("self_speculative", SamplingSettings(), "static"),
    ],
)
def test_rows_leave_at_different_times_for_different_reasons_and_the_others_go_on(
    strategy: str, sampling: SamplingSettings, engine: str
) -> None:
    decoder, prompts = decoder_named("llama whose exits agree"), [prompt_of(length) for length in _LENGTHS]
    settings = _settings(strategy, sampling=sampling, engine=engine)
    free = _together_and_alone(decoder, prompts, strategy, settings, CONTEXT)[0]
    eos = next(token for token in free[4].tokens[3:] if token not in free[2].tokens)
    pattern = free[0].tokens[9:12]
    settings = replace(settings, eos_token_ids=(eos,), stop=ends_after(pattern))
    together, alone = _together_and_alone(decoder, prompts, strategy, settings, 30 + 13)
    assert [_told(result) for result in together] == [_told(result) for result in alone]
    assert len({len(result.tokens) for result in together}) >= 3
    assert {"eos", "context_length"} <= {result.stop_reason for result in together}


@pytest.mark.parametrize("sampling", [_SAMPLING, SamplingSettings()])
def test_prompts_with_budgets_and_stops_of_their_own_come_out_as_alone(sampling: SamplingSettings) -> None:
    decoder, prompts = decoder_named("llama whose exits agree"), [prompt_of(length) for length in _LENGTHS[:4]]
    settings = _settings("self_speculative", sampling=sampling)
    free = _together_and_alone(decoder, prompts, "self_speculative", settings, CONTEXT)[0]
    ends = [Ends(7), Ends(0), Ends(20, ends_after(free[2].tokens[9:12])), Ends(20)]
    found = Decoding(
        decoder,
        prompts,
        strategy="self_speculative",
        settings=settings,
        generators=_generators(settings, len(prompts)),
        ends=ends,
    ).finish()
    generators = _generators(settings, len(prompts)) or [None] * len(prompts)  # type: ignore[list-item]
    for result, prompt, end, generator in zip(found, prompts, ends, generators, strict=True):
        own = replace(settings, max_new_tokens=end.max_new_tokens, stop=end.stop)
        alone = decode(decoder, prompt, strategy="self_speculative", settings=own, generator=generator)
        assert _told(result) == _told(alone)
    assert [(len(result.tokens), result.stop_reason) for result in found] == [
        (7, "max_new_tokens"),
        (0, "max_new_tokens"),
        (12, "stop"),
        (20, "max_new_tokens"),
    ]


@pytest.mark.parametrize(
    ("strategy", "sampling", "joins_after"),
    [
        ("dynamic exits", _SAMPLING, 4),
        *((strategy, _SAMPLING, 4) for strategy in STRATEGIES if strategy != "draft_model"),
        ("self_speculative", SamplingSettings(), 4),
        ("self_speculative", SamplingSettings(), 100),  # when all others end in the same round
    ],
)
def test_prompts_that_join_between_rounds_come_out_as_alone_and_so_do_the_others(
    strategy: Any, sampling: SamplingSettings, joins_after: int
) -> None:
    decoder, prompts = decoder_with_exit_blocks("llama whose exits agree"), [prompt_of(length) for length in _LENGTHS]
    changed: dict[str, Any] = {"exit_layer": 1} if strategy in ("self_speculative", "early_exit") else {}
    if strategy == "dynamic exits":
        decoder, strategy = decoder_named("llama whose exits agree"), "self_speculative"
        changed = {"draft_policy": "dynamic", "draft_exits": (2,)}
    settings = _settings(strategy, sampling=sampling, **changed)
    generators = _generators(settings, len(prompts)) or [None] * len(prompts)  # type: ignore[list-item]
    parts = [
        Decoding(
            decoder,
            [prompts[index] for index in part],
            strategy=strategy,
            settings=settings,
            generators=None if sampling.greedy else [generators[index] for index in part],
            ends=[Ends(0 if index == 3 else 20 if index else 6) for index in part],
        )
        for part in ([0, 4], [2, 3, 1])
    ]
    running, joining = parts
    streamed: dict[int, list[int]] = {index: [] for index in range(5)}
    has_joined = False
    for count, (index, step) in enumerate(running):
        streamed[index] += step.tokens
        left = {running.result(each).stop_reason for each in (0, 1)}
        if not has_joined and (count >= joins_after or "interrupted" not in left):
            has_joined = True
            for other, first in joining.begin():
                streamed[2 + other] += first.tokens
            assert list(running.join(joining)) == [2, 3, 4]
    assert has_joined
    found = [*running.results(), *joining.results()]
    assert [result.tokens for result in found] == list(streamed.values())
    for result, index in zip(found, [0, 4, 2, 3, 1], strict=True):
        budget = 0 if index == 3 else 20 if index else 6
        (generator,) = _generators(settings, index + 1)[index:] if not sampling.greedy else [None]  # type: ignore[index]
        own = replace(settings, max_new_tokens=budget)
        assert _told(result) == _told(
            decode(decoder, prompts[index], strategy=strategy, settings=own, generator=generator)
        )


def test_no_prompt_joins_where_more_than_a_cache_is_kept() -> None:
    decoder, own = decoder_named("llama whose exits agree"), decoder_with_exit_blocks("llama whose exits agree")
    gave_up = {"fall_back": True, "max_new_tokens": 60}
    for strategy, model, changed in (
        ("draft_model", decoder, {}),
        ("self_speculative", decoder, {"engine": "static"}),
        ("self_speculative", own, gave_up),
        ("self_speculative", own, {"draft_policy": "dynamic", "draft_exits": (2,)}),
    ):
        settings = _settings(strategy, **changed)
        decoding = Decoding(model, [prompt_of(4)], strategy=strategy, settings=settings)  # type: ignore[arg-type]
        assert not decoding.takes_prompts  # before it begins
        taken = []
        for _ in decoding:
            for row in decoding._rows:
                row.pace.gave_up = True
            taken.append(decoding.takes_prompts)
        assert taken[2:] == [False] * len(taken[2:])
        assert len(taken) > 3


def test_rows_without_a_budget_do_not_shift_the_others() -> None:
    decoder, prompts = decoder_named("llama whose exits agree"), [prompt_of(length) for length in (30, 4, 30, 9)]
    together, alone = _together_and_alone(decoder, prompts, "self_speculative", _settings("self_speculative"), 30)
    assert [_told(result) for result in together] == [_told(result) for result in alone]
    assert [len(result.tokens) for result in together] == [0, 20, 0, 20]


@pytest.mark.parametrize("lengths", [(9,), (9, 1, 30)])
def test_a_draft_model_that_agrees_is_believed_also_after_plain_rounds(
    lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.decoding.engine.perf_counter", HostileClock([1.0]))
    decoder = decoder_named("mistral with a window")
    decoder.limit = CONTEXT
    settings = _settings("draft_model", draft_decoder=decoder, max_new_tokens=60, fall_back=True)
    results = decode_batch(decoder, [prompt_of(n) for n in lengths], strategy="draft_model", settings=settings)
    for result in results:
        assert [step.drafted for step in result.steps] == [4] * 8 + [0] + [4] * 3 + [2]
        assert result.accepted == result.drafted


def test_every_row_streams_its_own_steps() -> None:
    decoder, prompts = decoder_named("llama whose exits agree"), [prompt_of(length) for length in _LENGTHS]
    streamed: list[list[int]] = [[] for _ in prompts]
    decoder.limit = CONTEXT
    results = decode_batch(
        decoder,
        prompts,
        strategy="self_speculative",
        settings=_settings("self_speculative"),
        on_step=lambda index, step: streamed[index].extend(step.tokens),
    )
    assert streamed == [result.tokens for result in results]


def test_blocks_that_have_grown_and_blocks_that_have_not_store_uneven_rows_alike() -> None:
    cache, new = KeyValueCache(num_layers=2, batch_size=2, capacity=4), torch.ones(2, 1, 1, 1)
    for layer_idx, num_positions in ((0, 6), (1, 4)):
        cache.append(new.expand(2, num_positions, 1, 1) * 0, new.expand(2, num_positions, 1, 1) * 0, layer_idx)
    cache.truncate([3, 1])
    for layer_idx in (0, 1):
        keys, _ = cache.append(new, new, layer_idx)
        assert keys[:, 0, :, 0].tolist() == [[0, 0, 0, 1], [0, 1, 0, 0]]


def test_the_comparison_notices_rows_kept_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = KeyValueCache.keep_rows
    monkeypatch.setattr(KeyValueCache, "keep_rows", lambda self, rows: kept(self, [*rows[1:], rows[0]]))
    decoder, prompts = decoder_named("llama whose exits agree"), [prompt_of(length) for length in _LENGTHS]
    eos = decode(decoder, prompts[1], strategy="autoregressive", settings=_settings("autoregressive")).tokens[2]
    settings = _settings("self_speculative", eos_token_ids=(eos,))
    together, alone = _together_and_alone(decoder, prompts, "self_speculative", settings, CONTEXT)
    assert [_told(result) for result in together] != [_told(result) for result in alone]
