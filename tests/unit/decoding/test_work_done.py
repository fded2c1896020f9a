"""What decoding makes the machine do: no block, head or wait for the device more than the scheme needs."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from app.decoding import acceptance
from app.decoding.drafters import DraftModelDrafter, FullModel
from app.decoding.engine import decode_batch
from app.decoding.result import DecodingResult
from app.decoding.sampling import SamplingSettings
from app.decoding.settings import DecodingSettings
from app.decoding.strategies import STRATEGIES
from app.spans.decoder import SpanDecoder
from tests.support.decoding import decode
from tests.support.fake_decoder import FakeDecoder, counting_decoder
from tests.unit.decoding.circumstances import HostileClock
from tests.unit.decoding.model_zoo import CONTEXT, VOCAB, decoder_named, draft_decoder, prompt_of

_MISSES = (6, 7, 12, 20, 21, 30)
_NEEDS: dict[str, dict[str, Any]] = {
    "autoregressive": {},
    "early_exit": {"exit_layer": 3},
    "self_speculative": {"exit_layer": 1, "num_draft_tokens": 4},
    "draft_model": {"num_draft_tokens": 4},
    "layer_skip": {"skipped_layers": (1, 2), "num_draft_tokens": 4},
    "n_gram": {"n_gram_match": 1},
}


def _decode(strategy: Any, **settings: Any) -> tuple[FakeDecoder, FakeDecoder, DecodingResult]:
    """Three prompt tokens and 30 more, on a decoder and a draft model that count what they run."""
    decoder, small = counting_decoder(misses=_MISSES), counting_decoder()
    for token in _MISSES:
        small.full_logits[token] = small.full_logits[token].roll(1)
    decoder.may_skip = strategy == "layer_skip"
    needs = _NEEDS[strategy] | ({"draft_decoder": small} if strategy == "draft_model" else {})
    chosen = DecodingSettings(**({"max_new_tokens": 30} | needs | settings))
    return decoder, small, decode(decoder, [1, 2, 3], strategy=strategy, settings=chosen)


@pytest.mark.parametrize("strategy", _NEEDS)
def test_the_prompt_runs_once_and_the_head_at_its_last_position_alone(strategy: str) -> None:
    decoder, small, _ = _decode(strategy)
    stop = 3 if strategy == "early_exit" else 4
    assert decoder.spans[0] == (0, stop, 3)
    assert decoder.heads[0] == 1
    assert sum(tokens for start, _, tokens in small.spans if start == 0) >= 3 or strategy != "draft_model"
    many = counting_decoder()
    chosen = DecodingSettings(max_new_tokens=1)
    decode_batch(many, [[1, 2, 3], [5], [7, 8]], strategy="autoregressive", settings=chosen)
    assert (many.spans, many.heads) == ([(0, 4, 3)], [3])


@pytest.mark.parametrize(("budget", "capacity"), [(1, 4), (30, 33), (10_000, 3 + 61)])
def test_room_is_reserved_for_the_prompt_and_what_can_follow(
    budget: int, capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(FakeDecoder, "new_cache", lambda self, *, batch_size, capacity: asked.append(capacity))
    with pytest.raises(AttributeError):  # there is no cache
        _decode("autoregressive", max_new_tokens=budget)
    assert asked == [capacity]


def test_the_first_blocks_see_each_drafted_token_once_and_the_others_each_verified_one() -> None:
    decoder, _, result = _decode("self_speculative")
    expected, heads = [(0, 4, 3)], [1]
    for step in result.steps:
        expected += [(0, 1, 1)] * (step.drafted + 1) + [(1, 4, step.drafted + 1)]
        heads += [1] * step.drafted + [step.drafted + 1]
    assert (decoder.spans, decoder.heads) == (expected, heads)
    assert {(step.drafted, step.accepted) for step in result.steps} >= {(4, 4), (4, 2), (4, 0)}


def test_an_exits_own_blocks_see_each_kept_position_once_and_the_last_draft_only_where_all_were_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FakeDecoder, "own_exit", 1)
    monkeypatch.setattr(FakeDecoder, "num_own", 2)
    decoder, _, result = _decode("self_speculative")
    expected = [(0, 1, 3), (4, 6, 3), (1, 4, 3)]
    for step in result.steps:
        expected += [(0, 1, 1), (4, 6, 1)] * step.drafted + [(0, 1, 1), (1, 4, step.drafted + 1)]
        expected += [(4, 6, 1)] * (step.accepted == step.drafted)
    assert decoder.spans == expected
    assert {(step.drafted, step.accepted) for step in result.steps} >= {(4, 4), (4, 2), (4, 0)}


def test_what_an_n_gram_drafts_costs_no_draft_step_and_runs_through_all_blocks_once() -> None:
    decoder = counting_decoder(misses=_MISSES)
    decoder.full_logits[15] = decoder.full_logits[3]  # after 15 comes 4 again
    settings = DecodingSettings(max_new_tokens=30, n_gram_match=1, n_gram_max_drafts=6, **_NEEDS["self_speculative"])
    result = decode(decoder, [1, 2, 3], strategy="self_speculative", settings=settings)
    expected, heads = [(0, 4, 3)], [1]
    for step in result.steps:
        alone = 0 if step.by_n_gram else step.drafted
        expected += [(0, 1, 1)] * alone + [(0, 1, step.drafted + 1 - alone), (1, 4, step.drafted + 1)]
        heads += [1] * alone + [step.drafted + 1]
    assert result.tokens == [*range(4, 16), *range(4, 16), *range(4, 10)]
    assert (decoder.spans, decoder.heads) == (expected, heads)
    assert [(step.drafted, step.by_n_gram) for step in result.steps[-3:]] == [(6, True), (6, True), (2, True)]
    drafted = [step for step in result.steps if step.by_n_gram]
    assert (result.rounds_by_n_gram, result.drafted_by_n_gram, result.accepted_by_n_gram) == (
        len(drafted),
        sum(step.drafted for step in drafted),
        sum(step.accepted for step in drafted),
    )
    assert 0 < result.drafted_by_n_gram < result.drafted


def test_layer_skip_drafts_with_the_kept_blocks_and_verifies_with_all() -> None:
    decoder, _, result = _decode("layer_skip")
    expected = [(0, 4, 3)]
    for step in result.steps:
        expected += [(0, 1, 1), (3, 4, 1)] * step.drafted + [(0, 4, step.drafted + 1)]
    assert decoder.spans == expected


def test_a_draft_model_runs_its_drafts_and_the_last_one_only_where_all_were_kept() -> None:
    decoder, small, result = _decode("draft_model")
    large, little = [(0, 4, 3)], [(0, 4, 3)]
    for step in result.steps:
        large += [(0, 4, step.drafted + 1)]
        little += [(0, 4, 1)] * (step.drafted + (0 < step.accepted == step.drafted))
    assert decoder.spans == large
    assert small.spans == little


@pytest.mark.parametrize("strategy", ["self_speculative", "draft_model", "layer_skip"])
def test_without_drafts_every_strategy_does_the_work_of_plain_decoding(strategy: str) -> None:
    plain, _, expected = _decode("autoregressive")
    decoder, small, result = _decode(strategy, draft_policy="off")
    assert result.tokens == expected.tokens
    assert result.drafted == 0
    assert decoder.heads == plain.heads
    assert decoder.elapsed == pytest.approx(plain.elapsed)
    assert small.spans == []


@pytest.mark.parametrize(
    ("strategy", "draft_step"),
    [("self_speculative", 1 + 0.5), ("layer_skip", 2 + 0.5), ("draft_model", 0.1 * (4 + 0.5))],
)
def test_rounds_cost_what_the_strategys_own_cost_model_says(
    strategy: Any, draft_step: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeDecoder, "head_size", 50)
    small = counting_decoder(misses=_MISSES)
    small.block_size, small.head_size = 10, 5
    needs = _NEEDS[strategy] | ({"draft_decoder": small} if strategy == "draft_model" else {})
    costs = STRATEGIES[strategy].costs
    assert costs is not None
    model = costs(counting_decoder(), DecodingSettings(max_new_tokens=30, **needs))
    assert model.draft_step == pytest.approx(draft_step)
    decoder, small, result = _decode(strategy)
    prefill = 4 * (1 + 2 * 0.03) + 0.5
    measured = decoder.elapsed - prefill
    if strategy == "draft_model":  # what a fully kept draft costs more is not in the model: the last token's blocks
        full = sum(0 < step.accepted == step.drafted for step in result.steps)
        measured += 0.1 * (small.elapsed - prefill - 4 * full)
    assert measured == pytest.approx(sum(model.round_cost(step.drafted) for step in result.steps))


def test_times_are_those_of_prefill_and_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock: list[FakeDecoder] = []
    monkeypatch.setattr("app.decoding.engine.perf_counter", lambda: clock[0].elapsed)
    clock.append(counting_decoder(misses=_MISSES))
    settings = DecodingSettings(max_new_tokens=30, **_NEEDS["self_speculative"])
    result = decode(clock[0], [1, 2, 3], strategy="self_speculative", settings=settings)
    assert result.seconds_prefill == pytest.approx(4 * (1 + 2 * 0.03) + 1)
    assert result.seconds_prefill + result.seconds_decode == pytest.approx(clock[0].elapsed)
    assert result.tokens_per_second == pytest.approx(29 / result.seconds_decode)


_TRANSFERS = ("tolist", "item", "__int__", "__float__", "__bool__", "__index__", "numpy", "cpu", "nonzero")


class _HiddenTransfers(TorchDispatchMode):
    """Operators that wait for the device to know a value or a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in ("local_scalar", "nonzero", "is_nonzero", "aten.equal", "masked_select")):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


_GREEDY, _SAMPLED = SamplingSettings(), SamplingSettings(temperature=1.0, top_k=9, top_p=0.9)


@pytest.mark.parametrize(
    ("lengths", "sampling", "policy"),
    [((9,), _GREEDY, "adaptive"), ((9, 1, 30), _GREEDY, "fixed"), ((9, 1, 30), _SAMPLED, "adaptive")],
)
@pytest.mark.parametrize("strategy", _NEEDS)
def test_the_host_waits_once_a_draft_step_and_once_a_round(
    lengths: tuple[int, ...], strategy: Any, sampling: SamplingSettings, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = decoder_named("llama whose exits agree")
    decoder.limit = CONTEXT
    needs = {"n_gram_match": 1} if policy == "adaptive" and strategy not in ("autoregressive", "early_exit") else {}
    needs |= _NEEDS[strategy] | ({"skipped_layers": (1,)} if strategy == "layer_skip" else {})
    if strategy == "draft_model":
        needs["draft_decoder"] = draft_decoder(1, VOCAB)
    settings = DecodingSettings(max_new_tokens=12, sampling=sampling, draft_policy=policy, **needs)
    generators = None if sampling.greedy else [torch.Generator().manual_seed(seed) for seed in range(len(lengths))]
    prompts, counts = [prompt_of(length) for length in lengths], Counter[str]()
    for name in _TRANSFERS:
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *args, name=name, real=real: counts.update([name]) or real(self, *args)
        )
    with _HiddenTransfers() as hidden:
        results = decode_batch(decoder, prompts, strategy=strategy, settings=settings, generators=generators)
    monkeypatch.undo()
    longest = [  # draft of each round that was not found in the text, among the rows that were still there
        max(
            0 if (step := result.steps[index]).by_n_gram else step.drafted
            for result in results
            if index < result.rounds
        )
        for index in range(max(result.rounds for result in results))
    ]
    assert counts == {"tolist": 1 + sum(drafted + 1 for drafted in longest)}
    assert hidden.seen == []


@pytest.mark.parametrize(
    ("lengths", "temperature", "processor"),
    [((9,), 0.0, None), ((9,), 1.0, lambda ids, scores: scores), ((9, 1, 30), 1.0, None)],
)
@pytest.mark.parametrize("strategy", _NEEDS)
def test_a_round_sends_the_latest_tokens_to_the_device_and_where_uneven_rows_stand(
    lengths: tuple[int, ...], strategy: Any, temperature: float, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = decoder_named("llama whose exits agree")
    decoder.limit = CONTEXT
    needs = dict(_NEEDS[strategy]) | ({"skipped_layers": (1,)} if strategy == "layer_skip" else {})
    if strategy == "draft_model":
        needs["draft_decoder"] = draft_decoder(1, VOCAB)
    sampling = SamplingSettings(temperature=temperature, top_p=0.9 if temperature else 1.0, processor=processor)
    settings = DecodingSettings(max_new_tokens=30, sampling=sampling, **needs)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(lengths))] if temperature else None
    prompts, counts = [prompt_of(length) for length in lengths], Counter[str]()
    _count(monkeypatch, counts, torch, "tensor")
    _count(monkeypatch, counts, SpanDecoder, "run_blocks")
    _count(monkeypatch, counts, FullModel, "keep_rows")
    _count(monkeypatch, counts, acceptance, "contexts")
    results = decode_batch(decoder, prompts, strategy=strategy, settings=settings, generators=generators)
    monkeypatch.undo()
    models = 2 if strategy == "draft_model" else 1
    prefill = 1 + models  # tokens, and for each model their numbers
    expected = prefill + max(result.rounds for result in results) + counts["contexts"]
    if len(lengths) == 1:
        assert counts["tensor"] == expected
    else:  # one for each span of blocks, and one for the rows that are left
        leaving = counts["keep_rows"] + (counts["keep_rows"] // 2 if models == 2 else 0)
        assert counts["tensor"] <= expected + counts["run_blocks"] + leaving
    assert bool(counts["contexts"]) == (processor is not None)


def _count(monkeypatch: pytest.MonkeyPatch, counts: Counter[str], owner: Any, name: str) -> None:
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **rest: counts.update([name]) or real(*args, **rest))


@pytest.mark.parametrize("lengths", [(9,), (9, 1, 30)])
def test_a_draft_model_that_was_given_up_is_let_go(lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.decoding.engine.perf_counter", HostileClock([1.0]))  # each draft step costs a round
    decoder = decoder_named("llama whose exits agree")
    decoder.limit = CONTEXT
    settings = DecodingSettings(
        max_new_tokens=60, num_draft_tokens=4, draft_decoder=draft_decoder(1, VOCAB), fall_back=True
    )
    prompts = [prompt_of(length) for length in lengths]
    kept: list[int | None] = []  # tokens for the small model to run later
    settle = DraftModelDrafter.settle

    def watched(self: DraftModelDrafter, to: Sequence[int]) -> None:
        settle(self, to)
        kept.append(None if self._draft_model is None else len(self._unseen))

    monkeypatch.setattr(DraftModelDrafter, "settle", watched)
    results = decode_batch(decoder, prompts, strategy="draft_model", settings=settings)
    assert all(result.fell_back_after is not None for result in results)
    let_go = kept.index(None)
    assert let_go < 15
    assert max(kept[:let_go]) <= 3  # type: ignore[type-var]
    assert set(kept[let_go:]) == {None}
    plain = decode_batch(decoder, prompts, strategy="autoregressive", settings=DecodingSettings(max_new_tokens=60))
    assert [result.tokens for result in results] == [result.tokens for result in plain]
