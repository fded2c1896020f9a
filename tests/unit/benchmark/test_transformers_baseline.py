from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from app.benchmark.transformers_baseline import GenerateResult, generate_batch
from app.decoding.engine import decode_batch
from app.decoding.settings import DecodingSettings
from app.spans.decoder import SpanDecoder
from app.spans.functional_block import join_projections
from tests.support.tiny_models import tiny_llama

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [9]]


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama(tied=False)


def _agreeing(model: LlamaForCausalLM, *, exit_layer: int) -> LlamaForCausalLM:
    """Blocks from `exit_layer` on do nothing, and the head is sure: drafts from there are always accepted."""
    with torch.no_grad():
        for layer in model.model.layers[exit_layer:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.mul_(100.0)
    return model


def _own(model: LlamaForCausalLM, prompts: list[list[int]], settings: DecodingSettings) -> list[Any]:
    return decode_batch(SpanDecoder(model), prompts, strategy="autoregressive", settings=settings)


def _both(model: LlamaForCausalLM, settings: DecodingSettings) -> list[tuple[Any, GenerateResult]]:
    return list(zip(_own(model, PROMPTS, settings), generate_batch(model, PROMPTS, settings), strict=True))


def test_prompts_of_different_lengths_come_out_as_by_our_own_engine(model: LlamaForCausalLM) -> None:
    join_projections(model)
    for ours, theirs in _both(model, DecodingSettings(max_new_tokens=12)):
        assert (theirs.tokens, theirs.stop_reason) == (ours.tokens, "max_new_tokens")
        assert (theirs.num_decoded, theirs.rounds, theirs.mean_tokens_per_round) == (11, 11, 1.0)
        assert theirs.seconds_prefill > 0.0
        assert theirs.seconds_decode > 0.0


def test_each_row_ends_at_any_of_its_end_of_sequence_tokens(model: LlamaForCausalLM) -> None:
    full = [result.tokens for result in _own(model, PROMPTS, DecodingSettings(max_new_tokens=12))]
    eos = full[0][4], full[1][8]
    settings = DecodingSettings(max_new_tokens=12, eos_token_ids=eos)
    both = _both(model, settings)
    for ours, theirs in both:
        assert (theirs.tokens, theirs.stop_reason) == (ours.tokens, ours.stop_reason)
    assert len({theirs.num_tokens for _, theirs in both}) > 1
    assert len({theirs.seconds_decode for _, theirs in both}) > 1  # a row's time ends with the row


def test_the_context_ends_rows_where_it_ends_our_own() -> None:
    model = tiny_llama(tied=False, max_length=12)
    both = _both(model, DecodingSettings(max_new_tokens=9))
    for ours, theirs in both:
        assert (theirs.tokens, theirs.stop_reason) == (ours.tokens, ours.stop_reason)
    assert [theirs.stop_reason for _, theirs in both] == ["max_new_tokens", "context_length", "max_new_tokens"]


@pytest.mark.parametrize("exit_layer", [1, 2, 3])
@pytest.mark.parametrize("drafts", [1, 4])
def test_its_early_exit_gives_the_full_models_tokens(model: LlamaForCausalLM, exit_layer: int, drafts: int) -> None:
    plain = DecodingSettings(max_new_tokens=14)
    settings = DecodingSettings(max_new_tokens=14, exit_layer=exit_layer, num_draft_tokens=drafts)
    for prompt in PROMPTS:
        (theirs,) = generate_batch(model, [prompt], settings)
        assert theirs.tokens == _own(model, [prompt], plain)[0].tokens
        assert (theirs.drafted, theirs.acceptance_rate) == (0, None)  # not known
        assert theirs.num_prefilled + sum(len(step.tokens) for step in theirs.steps) == 14


@pytest.mark.parametrize("drafts", [1, 2, 5])
def test_it_drafts_as_many_tokens_as_asked_for_and_its_first_round_comes_with_the_prompt(
    model: LlamaForCausalLM, drafts: int
) -> None:
    settings = DecodingSettings(max_new_tokens=2 * (drafts + 1) + 1, exit_layer=2, num_draft_tokens=drafts)
    (theirs,) = generate_batch(_agreeing(model, exit_layer=2), [PROMPTS[0]], settings)
    assert theirs.num_prefilled == drafts + 1
    assert [len(step.tokens) for step in theirs.steps] == [drafts + 1, 1]
    assert (theirs.num_decoded, theirs.mean_tokens_per_round) == (drafts + 2, (drafts + 2) / 2)


def test_nothing_of_the_models_own_generation_config_decides_and_all_of_it_is_put_back(
    model: LlamaForCausalLM,
) -> None:
    settings = DecodingSettings(max_new_tokens=8)
    expected = generate_batch(model, PROMPTS, settings)
    own = model.generation_config
    own.do_sample, own.temperature, own.repetition_penalty, own.num_assistant_tokens = True, 5.0, 7.0, 3
    own.assistant_early_exit, own.max_length = 1, 5
    before = own.to_dict()
    assert [r.tokens for r in generate_batch(model, PROMPTS, settings)] == [r.tokens for r in expected]
    early = DecodingSettings(max_new_tokens=8, exit_layer=2, num_draft_tokens=2)
    assert generate_batch(model, PROMPTS[:1], early)[0].tokens == expected[0].tokens
    assert model.generation_config is own
    assert own.to_dict() == before


def test_an_early_exit_stored_with_the_model_does_not_make_its_drafts_speculate_in_turn(
    model: LlamaForCausalLM,
) -> None:
    """Left to itself, transformers fills the draft's configuration from the model's, and drafts for the draft."""
    passes = list[int]()
    model.model.layers[0].register_forward_pre_hook(lambda *_: passes.append(1))

    def count(settings: DecodingSettings) -> int:
        passes.clear()
        generate_batch(model, PROMPTS[:1], settings)
        return len(passes)

    early = DecodingSettings(max_new_tokens=20, exit_layer=2, num_draft_tokens=3)
    alone = count(early)
    model.generation_config.assistant_early_exit = 2
    assert count(early) == alone
    assert count(DecodingSettings(max_new_tokens=20)) == 20


def test_an_interrupted_draft_leaves_the_model_as_it_was(model: LlamaForCausalLM) -> None:
    """transformers lowers config.num_hidden_layers for a draft and does not put it back after an exception."""
    own, seen = model.generation_config, list[int]()

    def interrupted(*args: object, **kwargs: object) -> None:
        seen.append(model.config.num_hidden_layers)
        if len(seen) == 3:
            raise KeyboardInterrupt

    model.model.layers[0].register_forward_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate_batch(model, PROMPTS[:1], DecodingSettings(max_new_tokens=8, exit_layer=2, num_draft_tokens=4))
    assert seen[-1] == 2
    assert model.config.num_hidden_layers == 4
    assert model.generation_config is own
