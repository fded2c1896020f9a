"""Against the most obvious code: transformers' hidden states, unembedded layer by layer and token by token."""

import math

import pytest
import torch
from transformers import LlamaForCausalLM

from app.lens.token_grid import read_token_grid
from app.model.exit_block import ExitBlock
from app.spans.decoder import SpanDecoder
from tests.support.slow_twins import greedy_by_recomputation
from tests.support.tiny_models import settling_llama, tiny_llama

PROMPT = [3, 1, 4, 1, 5]


@torch.no_grad()
def slow_logits(model: LlamaForCausalLM, tokens: list[int]) -> list[list[list[float]]]:
    """Logits as [layer][token][id], each token's from a pass over what is before it."""
    by_token = []
    for count in range(len(tokens)):
        out = model(torch.tensor([PROMPT + tokens[:count]]), output_hidden_states=True, use_cache=False)
        early = [model.lm_head(model.model.norm(state[0, -1])).tolist() for state in out.hidden_states[1:-1]]
        by_token.append([*early, out.logits[0, -1].tolist()])
    return [list(layer) for layer in zip(*by_token, strict=True)]


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("logits_per_chunk", [1, 2**24])
def test_every_cell_is_what_the_slow_twin_computes(monkeypatch, logits_per_chunk):
    monkeypatch.setattr("app.exits.states._LOGITS_PER_CHUNK", logits_per_chunk)
    model = settling_llama(later_blocks=0.3)
    tokens = greedy_by_recomputation(model, PROMPT, max_new_tokens=12)
    grid = read_token_grid(SpanDecoder(model), PROMPT, tokens)
    probs = [[softmax(logits) for logits in layer] for layer in slow_logits(model, tokens)]
    assert [row.label for row in grid.rows] == ["1", "2", "3", "4"]
    assert grid.choices_RN[-1].tolist() == tokens
    assert grid.num_rounded == 0
    for layer, column in ((layer, column) for layer in range(4) for column in range(12)):
        own, full = probs[layer][column], probs[-1][column]
        ranked = sorted(range(len(own)), key=lambda token: -own[token])[:5]  # called at once
        assert grid.top_ids_RNK[layer, column].tolist() == ranked
        assert grid.top_probs_RNK[layer, column].tolist() == pytest.approx([own[token] for token in ranked], abs=1e-5)
        entropy = -sum(share * math.log(share) for share in own)
        assert float(grid.entropy_RN[layer, column]) == pytest.approx(entropy, abs=1e-4)
        divergence = sum(p * math.log(p / q) for p, q in zip(full, own, strict=True))
        assert float(grid.kl_RN[layer, column]) == pytest.approx(divergence, abs=1e-4)
    choices = [[max(range(len(own)), key=own.__getitem__) for own in layer] for layer in probs]
    for column, token in enumerate(tokens):
        hits = [layer + 1 for layer in range(4) if choices[layer][column] == token]
        settled = next(first for first in range(1, 5) if {*range(first, 5)} <= {*hits})
        assert (grid.needed.saturation[column], grid.needed.hits[column]) == (settled, hits[0])
        lines = dict(zip(*grid.lines[column], strict=True))
        assert {*lines} == {layer[column] for layer in choices}
        assert sorted(lines, key=lambda token: -max(lines[token])) == [*lines]
        for each, shares in lines.items():
            assert shares == pytest.approx([layer[column][each] for layer in probs], abs=1e-5)
    assert len({*grid.needed.saturation}) > 1, "the model must settle early and late"
    assert grid.needed.saturation != grid.needed.hits, "some hit must be lost again"


def test_an_exits_own_blocks_and_norm_are_rows_of_their_own_that_count_for_nothing():
    model = settling_llama(later_blocks=0.3)
    blocks = {
        1: ExitBlock(model, exit_layer=1, source_layers=[2, 3]),
        3: ExitBlock(model, exit_layer=3, source_layers=[]),
    }
    with torch.no_grad():
        blocks[3].decoder.norm.weight.copy_(torch.linspace(-1, 2, 32))
    decoder = SpanDecoder(model, exit_blocks={layer: block.eval() for layer, block in blocks.items()})
    tokens = greedy_by_recomputation(model, PROMPT, max_new_tokens=8)
    grid, plain = (read_token_grid(each, PROMPT, tokens) for each in (decoder, SpanDecoder(model)))
    assert [row.label for row in grid.rows] == ["1", "1+2", "2", "3", "3+0", "4"]
    shared = [0, 2, 3, 5]
    torch.testing.assert_close(grid.top_probs_RNK[shared], plain.top_probs_RNK)
    assert grid.needed == plain.needed
    with torch.no_grad():
        out = model(torch.tensor([PROMPT + tokens[:-1]]), output_hidden_states=True)
        positions = torch.arange(out.logits.shape[1])[None]
        for index, layer in ((1, 1), (4, 3)):
            expected = model.lm_head(blocks[layer](out.hidden_states[layer], positions))[0, len(PROMPT) - 1 :]
            assert torch.equal(grid.choices_RN[index], expected.argmax(-1))
            best = expected.softmax(-1).amax(-1)
            torch.testing.assert_close(grid.top_probs_RNK[index, :, 0], best, atol=1e-5, rtol=0)
    decoder.use_draft_vocabulary(few := range(1, 20))
    drafted = read_token_grid(decoder, PROMPT, tokens)
    torch.testing.assert_close(drafted.kl_RN[shared], plain.kl_RN)
    full = out.logits[0, len(PROMPT) - 1 :, few].log_softmax(-1)
    own = expected[:, few].log_softmax(-1)
    torch.testing.assert_close(drafted.kl_RN[4], (full.exp() * (full - own)).sum(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(drafted.entropy_RN[4], -(own.exp() * own).sum(-1), atol=1e-5, rtol=0)
    assert {*drafted.top_ids_RNK[[1, 4]].flatten().tolist()} <= {*few}
    assert not torch.allclose(grid.top_probs_RNK[4], grid.top_probs_RNK[3], atol=1e-3)


def test_of_equal_logits_the_choice_is_the_lowest_id_and_stands_first():
    model = tiny_llama(num_layers=2)
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()  # tied, so that all logits are equal
    grid = read_token_grid(SpanDecoder(model), PROMPT, [0, 0])
    assert grid.choices_RN.tolist() == [[0, 0], [0, 0]]
    assert grid.top_ids_RNK[..., 0].tolist() == [[0, 0], [0, 0]]
