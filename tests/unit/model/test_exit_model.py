"""The first blocks of a model as a model of its own: the exit's logits, also when transformers builds it anew."""

import pytest
import torch

from app.errors import ConfigError
from app.export.directory import Weights
from app.export.first_blocks import first_blocks
from app.model.early_exit import EarlyExitModel
from app.model.exit_block import ExitBlock, exit_blocks_of
from app.model.exit_model import exit_model
from app.model_files.exit_blocks import StoredExitBlocks
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


def test_an_exit_with_an_affine_map_runs_but_is_no_model_to_be_written() -> None:
    model = make_model("llama").eval()
    blocks = exit_blocks_of(model, {1: [2]}, affine={1}).eval()
    torch.nn.init.normal_(blocks["1"].decoder.norm.linear.weight)
    with torch.no_grad():
        states = EarlyExitModel(model).states(TOKENS, POSITIONS, [1])[1]
        expected = model.lm_head(blocks["1"](states, POSITIONS))
        assert torch.equal(exit_model(model, 1, blocks["1"])(TOKENS).logits, expected)  # type: ignore[arg-type]
    stored = StoredExitBlocks(blocks.state_dict(), {1: [2]}, None)
    with pytest.raises(ConfigError, match="exit_layer: got 1, allowed an exit that is an ordinary model; this one has"):
        first_blocks(model, Weights.of(model), stored, exit_layer=1)


def test_an_exit_that_is_none_is_refused() -> None:
    model = make_model("llama")
    for exit_layer in (0, 3):
        with pytest.raises(ConfigError, match=r"exit_layer: got \d, allowed \[1, 2\]"):
            exit_model(model, exit_layer)
