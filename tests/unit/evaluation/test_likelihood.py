"""Log-probabilities of all exits in one pass are plain transformers', with one forward a text and one model an exit."""

import random
from itertools import chain

import pytest
import torch
from transformers import LlamaForCausalLM

from app.evaluation.likelihood import Scored, log_probabilities
from app.model.exit_block import ExitBlock
from app.spans.decoder import SpanDecoder
from tests.support.tiny_models import tiny_config, tiny_llama

EXITS = (1, 2, 4)
TOLERANCE = 2e-5


def _examples():
    """A batch: a beginning that all share, contexts of different lengths, choices of one token and of many."""
    chance = random.Random(0)

    def tokens(count):
        return [chance.randrange(61) for _ in range(count)]

    root = tokens(20)
    examples = []
    for lengths in ((1, 1, 1, 1), (2, 5, 1), (3, 3)):
        context = root + tokens(chance.randrange(3, 9))
        examples.append([Scored(context + tokens(length), len(context)) for length in lengths])
    sentence, end = root + tokens(3), tokens(4)  # the same end after two openings, as in WinoGrande
    openings = [sentence + tokens(count) for count in (2, 3)]
    examples.append([Scored(opening + end, len(opening)) for opening in openings])
    examples.append([Scored(root + tokens(30), 21)])  # a text without choices
    return examples


def _plain(model, scored):
    """The slow twin: the whole logits of one text in one forward."""
    logs = model(torch.tensor([list(scored.tokens)])).logits[0].float().log_softmax(-1)
    places = range(scored.start, len(scored.tokens))
    return torch.stack([logs[place - 1, scored.tokens[place]] for place in places])


def _first_blocks(model, exit_layer):
    """A model of its own that has the first blocks of the other."""
    shallow = LlamaForCausalLM(tiny_config(num_layers=exit_layer)).eval()
    shallow.load_state_dict({name: each for name, each in model.state_dict().items() if name in shallow.state_dict()})
    return shallow


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def found(model):
    with torch.no_grad():
        return log_probabilities(SpanDecoder(model), _examples(), EXITS)


def test_every_exit_is_a_model_of_its_first_blocks_and_the_full_one_is_plain_transformers(model, found):
    with torch.no_grad():
        for place, exit_layer in enumerate(EXITS):
            plain = model if exit_layer == 4 else _first_blocks(model, exit_layer)
            for example, own in zip(_examples(), found, strict=True):
                for scored, each in zip(example, own, strict=True):
                    assert each.shape == (len(EXITS), len(scored.tokens) - scored.start)
                    assert torch.allclose(each[place], _plain(plain, scored), atol=TOLERANCE), (exit_layer, scored)
    assert not torch.allclose(found[0][0][0], found[0][0][2], atol=0.1)  # exits differ


@pytest.mark.parametrize("size", [1, 2, 3])
def test_batches_of_any_size_and_choices_without_a_shared_prefix_give_the_same(model, found, size):
    decoder, examples = SpanDecoder(model), _examples()
    with torch.no_grad():
        batched = [
            each
            for first in range(0, len(examples), size)
            for each in log_probabilities(decoder, examples[first : first + size], EXITS)
        ]
        alone = [[log_probabilities(decoder, [[scored]], EXITS)[0][0] for scored in example] for example in examples]
    for whole, some, single in zip(found, batched, alone, strict=True):
        for a, b, c in zip(whole, some, single, strict=True):
            assert torch.allclose(a, b, atol=TOLERANCE)
            assert torch.allclose(a, c, atol=TOLERANCE)


def test_what_is_shared_is_run_once(model, monkeypatch):
    decoder, run = SpanDecoder(model), []
    monkeypatch.setattr(decoder, "embed", lambda tokens: run.append(tokens.shape) or SpanDecoder.embed(decoder, tokens))
    with torch.no_grad():
        log_probabilities(decoder, _examples()[:1] * 3, EXITS)
    context = _examples()[0][0].start
    assert run == [(1, context - 1), (3, 1)]  # what the batch shares, and the context's last token, which predicts


def test_an_exit_with_blocks_of_its_own_is_scored_through_them(model):
    with torch.no_grad():
        block = ExitBlock(model, exit_layer=2, source_layers=[0]).eval()
        block.decoder.norm.weight.mul_(1.5)
        found = log_probabilities(SpanDecoder(model, exit_blocks={2: block}), _examples(), (2, 4))
        scored = _examples()[1][1]
        ids = torch.tensor([list(scored.tokens)])
        state = model.model(ids, output_hidden_states=True).hidden_states[2]
        positions = torch.arange(ids.shape[1])[None]
        logs = model.lm_head(block(state, positions))[0].log_softmax(-1)
        expected = [logs[place - 1, scored.tokens[place]] for place in range(scored.start, len(scored.tokens))]
        assert torch.allclose(found[1][1][0], torch.stack(expected), atol=TOLERANCE)
        assert torch.allclose(found[1][1][1], _plain(model, scored), atol=TOLERANCE)


def test_logits_are_made_in_chunks_that_change_nothing(model, found, monkeypatch):
    monkeypatch.setattr("app.exits.states._LOGITS_PER_CHUNK", 3 * 61)  # three positions of 61 tokens
    monkeypatch.setattr("app.evaluation.likelihood._LOGITS_IN_CACHE", 2 * 61)
    with torch.no_grad():
        chunked = log_probabilities(SpanDecoder(model), _examples(), EXITS)
    for one, two in zip(chain(*found), chain(*chunked), strict=True):
        assert torch.allclose(one, two, atol=TOLERANCE)
