"""Decoding of tiny random models in fp32, against the plain model recomputed for every token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM

from app.decoding.engine import decode
from app.decoding.result import DecodingResult
from app.decoding.sampling import SamplingSettings
from app.decoding.settings import DecodingSettings
from app.model.kv_cache import KeyValueCache
from app.model.spans import SpanDecoder
from tests.support.slow_twins import greedy_by_recomputation
from tests.support.tiny_models import tiny_llama

_NEW_TOKENS = 16


def _disagreeing_llama(**config: object) -> LlamaForCausalLM:
    """A random model, whose exits rarely agree with it. Untied: tied random models repeat one token for ever."""
    return tiny_llama(seed=1, tied=False, **config)


def _agreeing_llama(**config: object) -> LlamaForCausalLM:
    """The same, but blocks after the first add little, so that exits often agree with it."""
    model = _disagreeing_llama(**config)
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.self_attn.o_proj.weight.mul_(0.1)
            layer.mlp.down_proj.weight.mul_(0.1)
    return model


def _prompt(length: int) -> list[int]:
    return torch.randint(0, 61, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def _speculate(model: LlamaForCausalLM, prompt: list[int], exit_layer: int, drafts: int) -> DecodingResult:
    settings = DecodingSettings(max_new_tokens=_NEW_TOKENS, exit_layer=exit_layer, num_draft_tokens=drafts)
    return decode(SpanDecoder(model), prompt, strategy="self_speculative", settings=settings)


@pytest.mark.parametrize("prompt_length", [1, 2, 17])
@pytest.mark.parametrize("build", [_agreeing_llama, _disagreeing_llama], ids=["exits agree", "exits rarely agree"])
def test_greedy_self_speculation_equals_recomputation_for_every_exit_and_draft_length(
    build: Callable[..., LlamaForCausalLM], prompt_length: int
) -> None:
    model, prompt = build(num_layers=3), _prompt(prompt_length)
    expected = greedy_by_recomputation(model, prompt, max_new_tokens=_NEW_TOKENS)
    settings = DecodingSettings(max_new_tokens=_NEW_TOKENS)
    assert decode(SpanDecoder(model), prompt, strategy="autoregressive", settings=settings).tokens == expected
    for exit_layer in (1, 2):
        for drafts in range(1, 9):
            assert _speculate(model, prompt, exit_layer, drafts).tokens == expected, (exit_layer, drafts)


def test_the_comparison_notices_rejected_drafts_left_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = _disagreeing_llama(num_layers=3), _prompt(17)
    monkeypatch.setattr(KeyValueCache, "truncate", lambda self, lengths: None)
    assert _speculate(model, prompt, 1, 3).tokens != greedy_by_recomputation(model, prompt, max_new_tokens=_NEW_TOKENS)


def test_the_two_models_exercise_full_partial_and_zero_accepts_on_varied_text() -> None:
    kept: dict[int, set[int]] = {}  # drafted in a round -> numbers of them kept
    for build in (_agreeing_llama, _disagreeing_llama):
        result = _speculate(build(num_layers=3), _prompt(17), 1, 3)
        for step in result.steps:
            kept.setdefault(step.drafted, set()).add(step.accepted)
        assert len(set(result.tokens)) > 5
    assert {0, 1, 3} <= kept[3], kept


def test_a_deeper_model_agrees_at_every_exit() -> None:
    model, prompt = _agreeing_llama(num_layers=4), _prompt(9)
    expected = greedy_by_recomputation(model, prompt, max_new_tokens=_NEW_TOKENS)
    for exit_layer in (1, 2, 3):
        assert _speculate(model, prompt, exit_layer, 4).tokens == expected


def test_early_exit_decoding_equals_recomputation_at_that_exit_and_differs_from_the_full_model() -> None:
    model, prompt = _disagreeing_llama(num_layers=3), _prompt(9)
    outputs = []
    for exit_layer in (1, 2, 3):
        settings = DecodingSettings(max_new_tokens=_NEW_TOKENS, exit_layer=exit_layer)
        outputs.append(decode(SpanDecoder(model), prompt, strategy="early_exit", settings=settings).tokens)
        assert outputs[-1] == greedy_by_recomputation(model, prompt, max_new_tokens=_NEW_TOKENS, exit_layer=exit_layer)
    assert outputs[0] != outputs[2]


def test_each_generated_token_as_eos_ends_both_ways_of_decoding_alike() -> None:
    model, prompt = _agreeing_llama(num_layers=3), _prompt(5)
    whole = greedy_by_recomputation(model, prompt, max_new_tokens=_NEW_TOKENS)
    for eos in set(whole):
        expected = whole[: whole.index(eos) + 1]
        settings = DecodingSettings(max_new_tokens=_NEW_TOKENS, exit_layer=1, num_draft_tokens=4, eos_token_ids=(eos,))
        result = decode(SpanDecoder(model), prompt, strategy="self_speculative", settings=settings)
        assert (result.tokens, result.stop_reason) == (expected, "eos")


def test_the_end_of_the_context_is_reached_exactly() -> None:
    model, prompt = _agreeing_llama(num_layers=3, max_length=20), _prompt(9)
    settings = DecodingSettings(max_new_tokens=100, exit_layer=1, num_draft_tokens=8)
    result = decode(SpanDecoder(model), prompt, strategy="self_speculative", settings=settings)
    assert result.tokens == greedy_by_recomputation(model, prompt, max_new_tokens=11)
    assert result.stop_reason == "context_length"


def test_sampling_is_a_function_of_the_generator_and_leaves_the_global_one_alone() -> None:
    decoder, before = SpanDecoder(_agreeing_llama(num_layers=3)), torch.get_rng_state()
    settings = DecodingSettings(
        max_new_tokens=_NEW_TOKENS,
        exit_layer=1,
        num_draft_tokens=3,
        sampling=SamplingSettings(temperature=1.0, top_k=20, top_p=0.95),
    )
    first, again, other = (
        decode(
            decoder,
            _prompt(5),
            strategy="self_speculative",
            settings=settings,
            generator=torch.Generator().manual_seed(seed),
        ).tokens
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)


def test_decoding_leaves_no_gradient_and_no_inference_tensor_behind() -> None:
    model = _disagreeing_llama(num_layers=3)
    _speculate(model, _prompt(5), 1, 3)
    assert all(p.grad is None and not p.is_inference() for p in model.parameters())
    model(torch.tensor([_prompt(5)])).logits.sum().backward()
