"""Processors of scores: drafter and full model show them the same whole contexts, as one-by-one decoding would."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation import (
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from app.decoding import acceptance
from app.decoding.engine import decode_batch
from app.decoding.result import DecodingResult
from app.decoding.sampling import LogitsProcessor, SamplingSettings
from app.decoding.settings import DecodingSettings
from tests.support.decoding import decode
from tests.support.fake_decoder import FakeDecoder
from tests.support.slow_twins import greedy_by_recomputation
from tests.unit.decoding.model_zoo import CONTEXT, VOCAB, decoder_named, draft_decoder, model_named, prompt_of

_Call = tuple[tuple[int, ...], bool]  # the tokens shown, and whether the scores were the full model's
_FULL, _EXITS = torch.randn(2, 7, 7, generator=torch.Generator().manual_seed(0)) * 2
_NEEDS: dict[str, dict[str, Any]] = {
    "autoregressive": {},
    "self_speculative": {"exit_layer": 1, "num_draft_tokens": 3},
    "draft_model": {"num_draft_tokens": 3},
    "layer_skip": {"skipped_layers": (1, 2), "num_draft_tokens": 3},
    "n_gram": {"n_gram_match": 1},
}


class _Recorder:
    """Passes scores on to another processor and notes every call."""

    def __init__(self, inner: LogitsProcessor) -> None:
        self._inner = inner
        self.calls: list[_Call] = []

    def __call__(self, ids_1S: Tensor, scores_1V: Tensor) -> Tensor:
        ids = tuple(ids_1S[0].tolist())
        is_full = torch.equal(scores_1V[0], _FULL[ids[-1]])
        assert is_full or torch.equal(scores_1V[0], _EXITS[ids[-1]]), "neither model's scores of this context"
        self.calls.append((ids, is_full))
        return self._inner(ids_1S, scores_1V)


def _run(strategy: Any, temperature: float, **settings: Any) -> tuple[list[_Call], DecodingResult]:
    recorder = _Recorder(LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.7), NoRepeatNGramLogitsProcessor(3)]))
    decoder = FakeDecoder(_FULL, _EXITS)
    decoder.may_skip = strategy == "layer_skip"
    needs = dict(_NEEDS[strategy])
    if strategy == "draft_model":
        needs["draft_decoder"] = FakeDecoder(_EXITS, _EXITS)
    sampling = SamplingSettings(temperature=temperature, processor=recorder)
    chosen = DecodingSettings(max_new_tokens=24, sampling=sampling, **needs, **settings)
    generator = torch.Generator().manual_seed(0) if temperature else None
    return recorder.calls, decode(decoder, [1, 2, 3], strategy=strategy, settings=chosen, generator=generator)


@pytest.mark.parametrize(("temperature", "policy"), [(0.0, "fixed"), (1.0, "adaptive")])
@pytest.mark.parametrize("strategy", ["self_speculative", "draft_model", "layer_skip"])
def test_every_call_is_the_one_its_position_asks_for(strategy: str, temperature: float, policy: str) -> None:
    calls, result = _run(strategy, temperature, draft_policy=policy)
    expected: list[_Call] = [((1, 2, 3), True)]
    text = [1, 2, 3, result.tokens[0]]
    for step in result.steps:
        drafts = [*step.tokens[: step.accepted], *step.rejected]
        expected += [((*text, *drafts[:i]), False) for i in range(len(drafts))]
        expected += [((*text, *drafts[:i]), True) for i in range(len(drafts) + 1)]
        text += step.tokens
    assert calls == expected
    assert 0 < result.accepted < result.drafted


@pytest.mark.parametrize("strategy", ["self_speculative", "draft_model", "layer_skip"])
def test_of_what_was_settled_the_full_model_shows_just_what_one_by_one_decoding_shows(strategy: str) -> None:
    calls, result = _run(strategy, 0.0)
    one_by_one, plain = _run("autoregressive", 0.0)
    assert result.tokens == plain.tokens
    text = (1, 2, 3, *result.tokens[:-1])
    assert [call for call in calls if call[1] and call[0] == text[: len(call[0])]] == one_by_one


def test_a_processor_that_writes_into_its_scores_changes_nothing_else() -> None:
    def in_place(ids_1S: Tensor, scores_1V: Tensor) -> Tensor:
        scores_1V[:, ids_1S[0, -2:]] = -torch.inf
        return scores_1V

    def copying(ids_1S: Tensor, scores_1V: Tensor) -> Tensor:
        return in_place(ids_1S, scores_1V.clone())

    outputs = []
    for processor in (in_place, copying):
        sampling = SamplingSettings(processor=processor)
        settings = DecodingSettings(max_new_tokens=20, sampling=sampling, **_NEEDS["self_speculative"])
        result = decode(FakeDecoder(_FULL, _EXITS), [1, 2], strategy="self_speculative", settings=settings)
        outputs.append((result.tokens, result.steps))
    assert outputs[0] == outputs[1]


def test_the_logits_themselves_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeDecoder, "unembed", lambda self, hidden, **_: logits)  # its own memory
    logits, before = _FULL[None, :1].clone(), _FULL[None, :1].clone()
    sampling = SamplingSettings(processor=lambda ids, scores: scores.fill_(1.0))
    settings = DecodingSettings(max_new_tokens=3, sampling=sampling)
    decode(FakeDecoder(_FULL, _EXITS), [1], strategy="autoregressive", settings=settings)
    assert torch.equal(logits, before)


def _processors() -> LogitsProcessorList:
    bias = SequenceBiasLogitsProcessor([[[5], 3.0], [[7, 9], -20.0]])
    return LogitsProcessorList([bias, RepetitionPenaltyLogitsProcessor(1.4), NoRepeatNGramLogitsProcessor(2)])


_PROMPT = prompt_of(17)
_MODELS = ["llama whose exits agree", "qwen3 with a window, joined", "olmo2 by modules"]


@pytest.mark.parametrize(
    ("name", "strategy"),
    [*((_MODELS[0], strategy) for strategy in _NEEDS), *((m, "self_speculative") for m in _MODELS[1:])],
)
def test_greedy_output_is_that_of_transformers_generate_with_the_same_processors(name: str, strategy: str) -> None:
    model, ids = model_named(name), torch.tensor([_PROMPT])
    with torch.no_grad():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=24,
            logits_processor=_processors(),
        )
    expected = output[0, len(_PROMPT) :].tolist()
    assert expected == greedy_by_recomputation(model, _PROMPT, max_new_tokens=24, processor=_processors())
    assert expected != greedy_by_recomputation(model, _PROMPT, max_new_tokens=24)  # they matter
    assert expected == _by_engine(name, strategy, [_PROMPT])[0]


def _by_engine(name: str, strategy: Any, prompts: list[list[int]]) -> list[list[int]]:
    needs = dict(_NEEDS[strategy])
    if strategy == "layer_skip":
        needs["skipped_layers"] = (1,)
    if strategy == "draft_model":
        needs["draft_decoder"] = draft_decoder(2, VOCAB + 9)
    settings = DecodingSettings(max_new_tokens=24, sampling=SamplingSettings(processor=_processors()), **needs)
    decoder = decoder_named(name)
    decoder.limit = CONTEXT
    return [result.tokens for result in decode_batch(decoder, prompts, strategy=strategy, settings=settings)]


@pytest.mark.parametrize("strategy", _NEEDS)
def test_every_row_of_a_batch_is_processed_with_its_own_context(strategy: str) -> None:
    prompts = [prompt_of(length) for length in (9, 1, 30)]
    together = _by_engine(_MODELS[0], strategy, prompts)
    assert together == [_by_engine(_MODELS[0], strategy, [prompt])[0] for prompt in prompts]


def test_the_comparison_notices_a_processor_that_is_not_shown_the_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    real = acceptance.process
    monkeypatch.setattr(
        acceptance,
        "process",
        lambda scores, rows, drafts, processor, *, first=False: torch.cat(
            [real(scores[:, i : i + 1], rows, [[] for _ in rows], processor) for i in range(scores.shape[1])], dim=1
        ),
    )
    wrong = _by_engine(_MODELS[0], "self_speculative", [_PROMPT])[0]
    assert wrong != greedy_by_recomputation(
        model_named(_MODELS[0]), _PROMPT, max_new_tokens=24, processor=_processors()
    )
