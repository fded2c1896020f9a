"""The loop alone, drawn widely: on a fake whose choices depend on all tokens before, and which checks its cache."""

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from app.decoding.drafters import DraftModelDrafter, FullModel, LayerSkipDrafter
from app.decoding.engine import decode_batch
from app.decoding.result import DecodingResult, Step
from app.decoding.sampling import SamplingSettings
from app.decoding.settings import DecodingSettings
from tests.support.decoding import decode
from tests.support.fake_decoder import FakeCache, FakeDecoder, past_after
from tests.support.slow_twins import cut_at_end
from tests.unit.decoding.circumstances import HostileClock, ends_after

_VOCAB, _NUM_DISTRIBUTIONS = 11, 23
_STRATEGIES = ("autoregressive", "self_speculative", "draft_model", "layer_skip", "n_gram")


class _Case(NamedTuple):
    seed: int
    agreement: float  # share of the distributions that exits share with the full model
    prompts: list[list[int]]
    context: int
    strategy: str
    settings: dict[str, Any]
    budget: int
    eos: tuple[int, ...]
    pattern: tuple[int, ...] = ()


@st.composite
def _cases(draw: st.DrawFn, *, sampled: bool = False) -> _Case:
    strategy = draw(st.sampled_from(_STRATEGIES))
    chosen: dict[str, Any] = {}
    if strategy != "autoregressive":
        chosen = {
            "num_draft_tokens": None if strategy == "n_gram" else draw(st.integers(1, 16)),
            "n_gram_match": draw(st.sampled_from((1, 2) if strategy == "n_gram" else (None, 1, 2))),
            "n_gram_max_drafts": draw(st.integers(1, 9)),
            "draft_policy": draw(st.sampled_from(("fixed", "adaptive", "off"))),
            "fall_back": sampled and draw(st.booleans()),  # a greedy batch has one clock for all
        }
    if strategy == "self_speculative":
        chosen["exit_layer"] = draw(st.integers(1, 3))
        if draw(st.booleans()):
            chosen |= {"draft_policy": "dynamic", "draft_exits": tuple(draw(st.sets(st.integers(1, 3))))}
    if strategy == "layer_skip":
        chosen["skipped_layers"] = tuple(draw(st.sets(st.integers(0, 3), min_size=1, max_size=3)))
    token = st.integers(0, _VOCAB - 1)
    return _Case(
        seed=draw(st.integers(0, 99)),
        agreement=draw(st.sampled_from((0.0, 0.5, 0.8, 1.0))),
        prompts=draw(st.lists(st.lists(token, min_size=1, max_size=12), min_size=1, max_size=5)),
        context=draw(st.sampled_from((12, 20, 40, 400))),
        strategy=strategy,
        settings=chosen,
        budget=draw(st.sampled_from((0, 1, 2, 10, 30))),
        eos=tuple(draw(st.sets(token, max_size=2))),
        pattern=tuple(draw(st.lists(token, max_size=2))),
    )


def _distributions(case: _Case) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(case.seed)
    full, other = torch.randn(2, _NUM_DISTRIBUTIONS, _VOCAB, generator=generator)
    agree = torch.rand(_NUM_DISTRIBUTIONS, 1, generator=generator) < case.agreement
    return full, full.where(agree, other)


def _decoder(full: torch.Tensor, exits: torch.Tensor, case: _Case) -> FakeDecoder:
    decoder = FakeDecoder(full, exits, max_length=case.context)
    decoder.by_past, decoder.may_skip = True, case.strategy == "layer_skip"
    return decoder


def _run(case: _Case, *, sampling: SamplingSettings | None = None, together: bool) -> list[DecodingResult]:
    full, exits = _distributions(case)
    settings = DecodingSettings(
        max_new_tokens=case.budget,
        eos_token_ids=case.eos,
        stop=ends_after(case.pattern) if case.pattern else None,
        sampling=sampling or SamplingSettings(),
        draft_decoder=_decoder(pad(exits, (0, 2)), pad(full, (0, 2)), case) if case.strategy == "draft_model" else None,
        **case.settings,
    )
    generators = None if sampling is None else [torch.Generator().manual_seed(i) for i in range(len(case.prompts))]
    shared: dict[str, Any] = {"strategy": case.strategy, "settings": settings}
    if together:
        return decode_batch(_decoder(full, exits, case), case.prompts, generators=generators, **shared)
    return [
        decode(_decoder(full, exits, case), prompt, generator=None if generators is None else generators[i], **shared)
        for i, prompt in enumerate(case.prompts)
    ]


def _told(results: list[DecodingResult]) -> list[tuple[list[int], str, tuple[Step, ...], int | None]]:
    return [(result.tokens, result.stop_reason, result.steps, result.fell_back_after) for result in results]


def _expected(case: _Case, prompt: list[int]) -> tuple[list[int], str]:
    past, endless = 0, []
    choices = _distributions(case)[0].argmax(-1).tolist()
    for token in prompt:
        past = past_after(past, token)
    room = case.context - len(prompt)
    for _ in range(min(case.budget, room)):
        endless.append(choices[past % _NUM_DISTRIBUTIONS])
        past = past_after(past, endless[-1])
    tokens, why = cut_at_end(endless, budget=len(endless), eos_token_ids=case.eos, pattern=case.pattern)
    return tokens, ("max_new_tokens" if case.budget <= room else "context_length") if why == "budget" else why


def _fits(case: _Case) -> _Case:
    return case._replace(prompts=[prompt[: case.context] for prompt in case.prompts])


@settings(max_examples=100)
@given(case=_cases().map(_fits))
def test_a_greedy_batch_gives_each_row_the_full_models_tokens_and_the_statistics_it_has_alone(case: _Case) -> None:
    together = _run(case, together=True)
    assert [(result.tokens, result.stop_reason) for result in together] == [
        _expected(case, prompt) for prompt in case.prompts
    ]
    assert _told(together) == _told(_run(case, together=False))


@settings(max_examples=60)
@given(case=_cases(sampled=True).map(_fits), temperature=st.sampled_from((0.3, 1.0)), top_k=st.sampled_from((None, 3)))
def test_a_sampled_batch_gives_each_row_what_it_gets_alone(case: _Case, temperature: float, top_k: int | None) -> None:
    sampling = SamplingSettings(temperature=temperature, top_k=top_k)
    assert _told(_run(case, sampling=sampling, together=True)) == _told(_run(case, sampling=sampling, together=False))


@settings(max_examples=30)
@given(case=_cases().map(_fits), ticks=st.lists(st.integers(1, 50), min_size=1, max_size=7))
def test_no_clock_changes_what_a_greedy_batch_says(case: _Case, ticks: list[int]) -> None:
    case = case._replace(settings=case.settings | {"fall_back": True}, budget=40, context=400)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("app.decoding.engine.perf_counter", HostileClock(ticks))
        results = _run(case, together=True)
    assert [result.tokens for result in results] == [_expected(case, prompt)[0] for prompt in case.prompts]


@settings(max_examples=25)
@given(case=_cases(sampled=True).map(_fits), ticks=st.lists(st.integers(1, 50), min_size=1, max_size=7))
def test_no_clock_changes_what_a_seed_gives(case: _Case, ticks: list[int]) -> None:
    case = case._replace(settings=case.settings | {"fall_back": True}, budget=40, context=400)
    sampling, told = SamplingSettings(temperature=1.0), []
    for clock in (HostileClock(ticks), HostileClock([1e-6])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("app.decoding.engine.perf_counter", clock)
            told.append(_told(_run(case, sampling=sampling, together=True)))
    assert told[0] == told[1]


def test_a_draft_model_catches_up_with_plain_rounds_in_between_also_for_the_rows_that_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = _Case(
        0, 1.0, [[1, 2], [3], [4, 5, 6]], 400, "draft_model", {"num_draft_tokens": 4, "fall_back": True}, 60, ()
    )
    whole = _run(case, together=True)
    # Eight rounds of five tokens, then a plain round to time it: the first row ends with it, its 42nd token.
    case = case._replace(pattern=tuple(whole[0].tokens[36:42]))
    monkeypatch.setattr("app.decoding.engine.perf_counter", HostileClock([1.0]))
    results = _run(case, together=True)
    assert [len(result.tokens) for result in results] == [42, 60, 60]
    for result in results[1:]:
        assert [(step.drafted, step.accepted) for step in result.steps] == [(4, 4)] * 8 + [(0, 0)] + [(4, 4)] * 3 + [
            (2, 2)
        ]


@pytest.mark.parametrize("prompts", [[[1, 2]], [[1, 2], [3], [4, 5, 6]]])
def test_a_draft_model_sees_what_n_grams_drafted(prompts: list[list[int]]) -> None:
    settings = {"num_draft_tokens": 2, "n_gram_match": 1, "n_gram_max_drafts": 4}
    results = _run(_Case(0, 1.0, prompts, 400, "draft_model", settings, 60, ()), together=True)
    steps = [step for result in results for step in result.steps]
    assert {0, 1} < {step.accepted for step in steps if step.by_n_gram}
    assert all(not step.rejected for step in steps if not step.by_n_gram)  # it is the model itself


_EXAMPLE = _Case(3, 0.5, [[1, 2, 3], [4], [5, 6, 7, 8]], 400, "draft_model", {"num_draft_tokens": 4}, 30, (9,))


@pytest.mark.parametrize("strategy", ["self_speculative", "draft_model", "layer_skip"])
def test_the_fake_notices_a_cache_that_keeps_what_was_rejected(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = {"self_speculative": {"exit_layer": 1}, "draft_model": {}, "layer_skip": {"skipped_layers": (1, 3)}}
    case = _EXAMPLE._replace(strategy=strategy, settings={"num_draft_tokens": 4, **needs[strategy]})
    monkeypatch.setattr(FakeCache, "truncate", lambda self, lengths: None)
    try:
        tokens = [result.tokens for result in _run(case, together=True)]
    except AssertionError:
        return
    assert tokens != [_expected(case, prompt)[0] for prompt in case.prompts]


def test_the_fake_notices_drafts_of_layer_skip_left_for_the_full_model(monkeypatch: pytest.MonkeyPatch) -> None:
    case = _EXAMPLE._replace(strategy="layer_skip", settings={"num_draft_tokens": 4, "skipped_layers": (1,)})
    monkeypatch.setattr(LayerSkipDrafter, "verify", FullModel.verify)
    with pytest.raises(AssertionError, match=r"equally filled|saw a draft's states"):
        _run(case, together=True)


def test_the_statistics_notice_rows_of_the_draft_model_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DraftModelDrafter, "keep_rows", FullModel.keep_rows)
    alone = _told(_run(_EXAMPLE, together=False))
    assert len({len(tokens) for tokens, *_ in alone}) > 1
    with pytest.raises((IndexError, ValueError, RuntimeError)):  # more rows than were fed
        _run(_EXAMPLE, together=True)
