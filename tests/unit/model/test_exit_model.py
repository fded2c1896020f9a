"""The first blocks of a model as a model of its own: the exit's logits, also when transformers builds it anew."""

import pytest
import torch

from app.errors import ConfigError
from app.model.early_exit import EarlyExitModel
from app.model.exit_block import ExitBlock
from app.model.exit_model import exit_model
from tests.unit.spans.test_architectures import ARCHITECTURES, DECODABLE, TOKENS, make_model

POSITIONS = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)


@pytest.mark.parametrize("name", DECODABLE)
def test_it_says_what_the_exit_says(name: str) -> None:
    kind, extra = ARCHITECTURES[name]
    model = make_model(kind, **extra).eval()
    block = ExitBlock(model, exit_layer=1, source_layers=[2]).eval()
    torch.nn.init.uniform_(block.decoder.norm.weight)
    firsts = exit_model(model, 2), exit_model(model, 1, block)
    anew = [type(model)(first.config).eval() for first in firsts]
    for built, first in zip(anew, firsts, strict=True):
        built.load_state_dict(first.state_dict())
    network = EarlyExitModel(model)
    with torch.no_grad():
        shared = network.head(network.hidden_by_exit(TOKENS, POSITIONS, [2])[2])
        own = network.head(block(network.states(TOKENS, POSITIONS, [1])[1], POSITIONS))
        for first, built, expected in zip(firsts, anew, (shared, own), strict=True):
            assert torch.equal(first(TOKENS).logits, expected)
            assert torch.equal(built(TOKENS).logits, expected)
    assert firsts[0].get_input_embeddings() is model.get_input_embeddings()


def test_an_exit_that_is_none_is_refused() -> None:
    model = make_model("llama")
    for exit_layer in (0, 3):
        with pytest.raises(ConfigError, match=r"exit_layer: got \d, allowed \[1, 2\]"):
            exit_model(model, exit_layer)
