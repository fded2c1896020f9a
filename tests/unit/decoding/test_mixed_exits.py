"""Drafts from several exits on one cache: whatever is drafted from where, all is as if nothing had been drafted.

Shape legend: `B` sequences, `S` verified positions (drafts + 1).
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.decoding.engine import decode_batch
from app.decoding.exit_choice import ExitChoice
from app.decoding.mixed_exits import MixedExitDrafter
from app.decoding.result import DecodingResult
from app.decoding.settings import DecodingSettings
from tests.support.decoding import decode
from tests.support.fake_decoder import FakeDecoder, counting_decoder
from tests.unit.decoding.circumstances import HostileClock
from tests.unit.decoding.model_zoo import (
    CONTEXT,
    NAMES,
    VOCAB,
    LimitedDecoder,
    continuation,
    decoder_named,
    decoder_with_exit_blocks,
    prompt_of,
)

_NUM_TOKENS = 24
_LAYERED = tuple(name for name in NAMES if decoder_named(name).num_layers > 2)


def _scripted(monkeypatch: pytest.MonkeyPatch, exits: Sequence[int], *, every_token: bool = True) -> None:
    """Let every draft, or every round, come from the next of these exits, over and over."""
    count = Counter[str]()

    def next_exit(_: ExitChoice) -> int:
        return exits[(count["drafts"] if every_token else count["rounds"]) % len(exits)]

    def exit_of_a_draft(choice: ExitChoice) -> int:
        chosen = next_exit(choice)
        count["drafts"] += 1
        return chosen

    def begin(choice: ExitChoice) -> int:
        count["rounds"] += 1
        return next_exit(choice)

    monkeypatch.setattr(ExitChoice, "__init__", lambda self, costs, *, by_clock: setattr(self, "_costs", costs))
    monkeypatch.setattr(ExitChoice, "exit_layer", property(exit_of_a_draft), raising=False)
    monkeypatch.setattr(ExitChoice, "begin_round", begin)
    monkeypatch.setattr(ExitChoice, "observe", lambda self, **_: None)


@settings(max_examples=40)
@given(data=st.data())
def test_exits_that_change_with_every_round_or_token_give_the_tokens_of_recomputing_everything(
    data: st.DataObject,
) -> None:
    name = data.draw(st.sampled_from(_LAYERED))
    lengths = data.draw(st.lists(st.sampled_from((1, 2, 17, 64)), min_size=1, max_size=3))
    decoder = data.draw(st.sampled_from((decoder_named, decoder_with_exit_blocks)))(name)
    exits = data.draw(st.lists(st.integers(1, decoder.num_layers - 1), min_size=1, max_size=7))
    vocabulary = data.draw(st.sampled_from((None, VOCAB // 2)))
    expected = [continuation(name, length, _NUM_TOKENS) for length in lengths]
    budget = min(map(len, expected))
    chosen = DecodingSettings(
        max_new_tokens=budget,
        eos_token_ids=tuple(expected[0][-1:]) if data.draw(st.booleans()) else (),
        exit_layer=exits[0],
        draft_exits=tuple(exits),
        num_draft_tokens=data.draw(st.integers(1, 6)),
        draft_policy="dynamic",
        n_gram_match=data.draw(st.sampled_from((None, None, 1, 2))),
        fall_back=data.draw(st.booleans()),
    )
    decoder.limit = CONTEXT
    decoder.use_draft_vocabulary(None if vocabulary is None else range(vocabulary))
    with pytest.MonkeyPatch.context() as patch:
        _scripted(patch, exits, every_token=data.draw(st.booleans()))
        patch.setattr("app.decoding.engine.perf_counter", HostileClock([1, 3]))
        results = decode_batch(decoder, [*map(prompt_of, lengths)], strategy="self_speculative", settings=chosen)
    decoder.use_draft_vocabulary(None)
    for result, tokens in zip(results, expected, strict=True):
        stop = next((i + 1 for i, token in enumerate(tokens[:budget]) if token in chosen.eos_token_ids), budget)
        assert result.tokens == tokens[:stop]


def _fresh(decoder: LimitedDecoder, chosen: DecodingSettings, texts: Sequence[Sequence[int]]) -> MixedExitDrafter:
    """A drafter that has seen these texts as prompts."""
    drafter = MixedExitDrafter(decoder, chosen, len(texts), 8)
    longest = max(map(len, texts))
    padded = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
    drafter.prefill(padded, [*map(len, texts)])
    return drafter


@settings(max_examples=40)
@given(data=st.data())
def test_after_any_rounds_states_keys_and_values_are_those_of_a_fresh_prefill(data: st.DataObject) -> None:
    """Rows keep any number of drafts and leave; then drafts from every exit and a verification tell what is stored."""
    decoder = decoder_with_exit_blocks(data.draw(st.sampled_from(_LAYERED)))
    decoder.limit = CONTEXT
    exits = tuple(range(1, decoder.num_layers))
    chosen = DecodingSettings(
        max_new_tokens=1, exit_layer=1, draft_exits=exits, num_draft_tokens=1, draft_policy="dynamic"
    )
    texts = [prompt_of(length) for length in data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))]
    token, exit_layer = st.integers(0, VOCAB - 1), st.sampled_from(exits)
    with torch.no_grad():
        drafter = _fresh(decoder, chosen, texts)
        for number in range(data.draw(st.integers(1, 4))):
            if number and len(texts) > 1 and data.draw(st.booleans()):
                drafter.keep_rows(rows := data.draw(st.sampled_from(([0], [len(texts) - 1, 0]))))
                texts = [texts[row] for row in rows]
            drafts, found = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 2))
            rows_of = st.lists(token, min_size=len(texts), max_size=len(texts))
            tokens_BS = torch.tensor([data.draw(rows_of) for _ in range(drafts + found + 1)]).T
            for column in range(drafts):
                of_rows = data.draw(st.lists(exit_layer, min_size=len(texts), max_size=len(texts)))
                drafter.draft(tokens_BS[:, column], of_rows)
            drafter.verify(tokens_BS)
            kept = data.draw(st.lists(st.integers(1, drafts + found + 1), min_size=len(texts), max_size=len(texts)))
            texts = [[*text, *row[:n]] for text, row, n in zip(texts, tokens_BS.tolist(), kept, strict=True)]
            drafter.settle([*map(len, texts)])
        fresh, tokens_B = _fresh(decoder, chosen, texts), torch.tensor([5] * len(texts))
        order = data.draw(st.permutations(exits))
        for each in order:
            ours, theirs = (one.draft(tokens_B, [each] * len(texts)) for one in (drafter, fresh))
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        tokens_BS = torch.tensor([[*[5] * len(order), 7]] * len(texts))
        torch.testing.assert_close(drafter.verify(tokens_BS), fresh.verify(tokens_BS), atol=1e-4, rtol=1e-4)


def test_each_row_gets_the_logits_of_its_own_exit() -> None:
    decoder, chosen = (
        decoder_with_exit_blocks("llama of 5 layers, joined"),
        DecodingSettings(
            max_new_tokens=1, exit_layer=1, draft_exits=(2, 3), num_draft_tokens=1, draft_policy="dynamic"
        ),
    )
    texts, tokens_B = [prompt_of(9), prompt_of(4), prompt_of(6)], torch.tensor([5, 6, 7])
    with torch.no_grad():
        ours = _fresh(decoder, chosen, texts).draft(tokens_B, [3, 1, None])
        by_exit = {each: _fresh(decoder, chosen, texts).draft(tokens_B, [each] * 3) for each in (1, 3)}
    torch.testing.assert_close(ours[0], by_exit[3][0])
    torch.testing.assert_close(ours[1], by_exit[1][1])
    assert not torch.allclose(by_exit[1], by_exit[3], atol=0.1)


def _counted(
    monkeypatch: pytest.MonkeyPatch, exits: Sequence[int], **changed: Any
) -> tuple[FakeDecoder, DecodingResult]:
    _scripted(monkeypatch, exits)
    decoder = counting_decoder(misses=(6, 7, 12, 20, 21, 30))
    needs: dict[str, Any] = {"max_new_tokens": 30, "num_draft_tokens": 4, "exit_layer": 1, "draft_exits": (2, 3)}
    chosen = DecodingSettings(draft_policy="dynamic", **(needs | changed))
    return decoder, decode(decoder, [1, 2, 3], strategy="self_speculative", settings=chosen)


def test_going_deeper_takes_all_pending_positions_along_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.decoding.draft_policy.AdaptivePolicy.goes_on", lambda *_: True)
    decoder, result = _counted(monkeypatch, (1, 1, 3, 2))
    assert [step.exits for step in result.steps[:2]] == [(1, 1, 3, 2), (1, 1, 3, 2)]
    expected = [(0, 4, 3)]
    for _ in result.steps[:-1]:
        expected += [(0, 1, 1), (0, 1, 1)]  # two positions from exit 1
        expected += [(0, 1, 1), (1, 3, 3)]  # the third takes both along to exit 3
        expected += [(0, 2, 1)]  # the fourth needs no more than exit 2
        expected += [(0, 2, 1), (2, 3, 2), (3, 4, 5)]  # verification completes the last, the fourth, then all
    assert decoder.spans[: len(expected)] == expected
    positions = Counter[int]()
    for start, stop, tokens in decoder.spans:
        positions.update(dict.fromkeys(range(start, stop), tokens))
    assert set(positions.values()) == {3 + sum(step.drafted + 1 for step in result.steps)}


def test_an_exits_own_blocks_catch_up_in_one_pass_when_it_drafts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeDecoder, "own_exit", 2)
    monkeypatch.setattr(FakeDecoder, "num_own", 1)
    decoder, result = _counted(monkeypatch, (2, 3, 3, 3), num_draft_tokens=1)
    assert [step.exits for step in result.steps[:5]] == [(2,), (3,), (3,), (3,), (2,)]
    settled = [len(step.tokens) for step in result.steps]
    own = [tokens for start, _, tokens in decoder.spans if start == 4]
    # The prompt, the latest token, then what four rounds settled but for the position that it had drafted at.
    assert own[:3] == [3, 1, sum(settled[:4]) - 1 + 1]


def test_the_result_tells_which_exit_drafted_what(monkeypatch: pytest.MonkeyPatch) -> None:
    _, result = _counted(monkeypatch, (1, 3), num_draft_tokens=2)
    drafted, accepted = Counter[int](), Counter[int]()
    for step in result.steps:
        drafted.update(step.exits)
        accepted.update(step.exits[: step.accepted])
    assert 0 < result.accepted < result.drafted
    assert (result.drafted_by_exit, result.accepted_by_exit) == (drafted, accepted)
    assert sum(result.drafted_by_exit.values()) == result.drafted
