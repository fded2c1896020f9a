"""Greedy decoding by any strategy gives the tokens of the plain model recomputed for every token, whatever is drawn."""

from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.decoding.result import DecodingResult
from app.decoding.settings import DecodingSettings
from app.spans.kv_cache import KeyValueCache
from tests.support.decoding import decode
from tests.support.slow_twins import cut_at_end
from tests.unit.decoding.circumstances import HostileClock, ends_after
from tests.unit.decoding.model_zoo import (
    CONTEXT,
    NAMES,
    VOCAB,
    continuation,
    decoder_named,
    decoder_with_exit_blocks,
    draft_decoder,
    prompt_of,
)

_NUM_TOKENS = 24
_ENDLESS = 10_000


class _Case(NamedTuple):
    """A way to decode a prompt, and what makes it end, given by positions in the continuation."""

    strategy: str
    settings: dict[str, Any]
    budget: str
    eos_positions: tuple[int, ...]
    pattern: tuple[int, int]  # where it begins in the continuation, and its length; length 0 is none
    clock: tuple[int, ...]
    exit_blocks: bool = False
    draft_vocabulary: int | None = None  # ids below this one


@st.composite
def _cases(draw: st.DrawFn, num_layers: int) -> _Case:
    strategy = draw(st.sampled_from(("self_speculative", "draft_model", "layer_skip", "autoregressive", "n_gram")))
    chosen: dict[str, Any] = {}
    if strategy != "autoregressive":
        if strategy != "n_gram":
            chosen["num_draft_tokens"] = draw(st.integers(1, 16))
        chosen["n_gram_match"] = draw(st.sampled_from((1, 2, 1, 2) if strategy == "n_gram" else (None, None, 1, 2)))
        chosen["n_gram_max_drafts"] = draw(st.sampled_from((1, 3, 8)))
        chosen["draft_policy"] = draw(st.sampled_from(("fixed", "fixed", "adaptive", "off")))
        chosen["fall_back"] = draw(st.booleans())
    if strategy == "self_speculative":
        chosen["exit_layer"] = draw(st.integers(1, num_layers - 1))
    if strategy in ("self_speculative", "autoregressive") and not chosen.get("n_gram_match"):
        chosen["engine"] = draw(st.sampled_from(("dynamic", "static")))
    if strategy == "draft_model":
        chosen["draft_decoder"] = draft_decoder(draw(st.integers(1, 2)), draw(st.sampled_from((VOCAB, VOCAB + 9))))
    if strategy == "layer_skip":
        layers = st.sets(st.integers(0, num_layers - 1), min_size=1, max_size=num_layers - 1)
        chosen["skipped_layers"] = tuple(draw(layers))
    return _Case(
        strategy=strategy,
        settings=chosen,
        budget=draw(st.sampled_from(("0", "1", "2", "exact", "context", "context", "exact"))),
        eos_positions=tuple(draw(st.lists(st.integers(0, _NUM_TOKENS - 1), max_size=2))),
        pattern=draw(st.tuples(st.integers(0, _NUM_TOKENS - 1), st.sampled_from((0, 0, 0, 1, 2, 3)))),
        clock=tuple(draw(st.lists(st.integers(1, 50), min_size=1, max_size=5))),
        exit_blocks=draw(st.booleans()),
        draft_vocabulary=draw(st.sampled_from((None, None, 1, VOCAB // 2, VOCAB))),
    )


def _compare(name: str, prompt_length: int, case: _Case) -> tuple[DecodingResult, list[int], str]:
    """What the engine gives, what it should, and why that should end."""
    endless, prompt = continuation(name, prompt_length, _NUM_TOKENS), prompt_of(prompt_length)
    most = len(endless)
    budget = {"0": 0, "1": 1, "2": 2, "exact": most, "context": _ENDLESS}[case.budget]
    eos = {endless[position] for position in case.eos_positions if position < most} | {VOCAB - 1} - set(endless)
    start, length = case.pattern
    pattern = endless[start : start + length]
    expected, why = cut_at_end(endless, budget=min(budget, most), eos_token_ids=tuple(eos), pattern=pattern)
    if why == "budget":
        why = "max_new_tokens" if budget <= most else "context_length"
    decoder = decoder_with_exit_blocks(name) if case.exit_blocks else decoder_named(name)
    decoder.limit = prompt_length + most
    decoder.use_draft_vocabulary(None if case.draft_vocabulary is None else range(case.draft_vocabulary))
    chosen = DecodingSettings(
        max_new_tokens=budget,
        eos_token_ids=tuple(sorted(eos)),
        stop=ends_after(pattern) if pattern else None,
        **case.settings,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("app.decoding.engine.perf_counter", HostileClock(case.clock))
        result = decode(decoder, prompt, strategy=case.strategy, settings=chosen)  # type: ignore[arg-type]
    return result, expected, why


@settings(max_examples=60)
@given(data=st.data())
def test_every_way_of_decoding_gives_the_tokens_of_recomputing_everything(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(NAMES))
    prompt_length = data.draw(st.one_of(st.sampled_from((1, 2, 17, 64)), st.integers(1, 300)))
    for case in data.draw(st.lists(_cases(decoder_named(name).num_layers), min_size=3, max_size=3)):
        result, expected, why = _compare(name, prompt_length, case)
        assert (result.tokens, result.stop_reason) == (expected, why), case
        settled = [*result.tokens[:1], *(token for step in result.steps for token in step.tokens)]
        assert settled[: len(expected)] == expected


@pytest.mark.parametrize("name", ["llama whose exits agree", "llama whose exits disagree"])
def test_every_exit_and_draft_length_gives_the_same_tokens(name: str) -> None:
    endless, decoder = continuation(name, 17, _NUM_TOKENS), decoder_named(name)
    kept: set[tuple[int, int]] = set()
    for exit_layer in range(1, decoder.num_layers):
        for drafts in (1, 3, 8, 16) if "disagree" in name else range(1, 17):
            case = _Case(
                "self_speculative", {"exit_layer": exit_layer, "num_draft_tokens": drafts}, "exact", (), (0, 0), (1,)
            )
            result, expected, _ = _compare(name, 17, case)
            assert result.tokens == expected == endless, (exit_layer, drafts)
            kept |= {(step.drafted, step.accepted) for step in result.steps}
    assert {(3, 0)} <= kept if "disagree" in name else {(3, 0), (3, 1), (3, 3)} <= kept


@pytest.mark.parametrize("name", NAMES)
def test_an_exit_that_copies_all_later_blocks_has_every_draft_kept(name: str) -> None:
    endless, decoder = continuation(name, 17, _NUM_TOKENS), decoder_with_exit_blocks(name, perfect=True)
    decoder.limit = CONTEXT
    spoken = [token for token in range(VOCAB) if token != endless[-2]]  # at least one draft is not to be kept
    for vocabulary in (None, spoken):
        decoder.use_draft_vocabulary(vocabulary)
        chosen = DecodingSettings(max_new_tokens=len(endless), exit_layer=1, num_draft_tokens=3)
        result = decode(decoder, prompt_of(17), strategy="self_speculative", settings=chosen)
        assert result.tokens == endless
        unspeakable = sum(token == endless[-2] for token in endless[1:])
        assert sum(step.accepted < step.drafted for step in result.steps) <= (unspeakable if vocabulary else 0)
    decoder.use_draft_vocabulary(None)
    early = decode(
        decoder, prompt_of(17), strategy="early_exit", settings=DecodingSettings(max_new_tokens=9, exit_layer=1)
    )
    assert early.tokens == endless[:9]


def test_the_models_say_varied_things() -> None:
    for name in NAMES:
        assert any(len(set(continuation(name, length, _NUM_TOKENS))) >= 4 for length in (17, 1, 64)), name


@pytest.mark.parametrize("strategy", ["self_speculative", "draft_model"])
def test_the_comparison_notices_rejected_drafts_left_in_the_cache(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafts = {
        "self_speculative": {"exit_layer": 1},
        "draft_model": {"draft_decoder": draft_decoder(1, VOCAB)},
    }[strategy]
    monkeypatch.setattr(KeyValueCache, "truncate", lambda self, lengths: None)
    case = _Case(strategy, {"num_draft_tokens": 3, **drafts}, "exact", (), (0, 0), (1,))
    result, expected, _ = _compare("llama whose exits disagree", 17, case)
    assert result.tokens != expected
