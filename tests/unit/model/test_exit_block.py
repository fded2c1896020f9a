"""Exit blocks: copies of blocks that run like the model's own, and that the model never sees."""

import pytest
import torch

from app.errors import ConfigError
from app.model.early_exit import EarlyExitModel
from app.model.exit_block import ExitBlock, exit_blocks_of, source_layers
from app.spans.decoder import SpanDecoder
from tests.unit.spans.test_architectures import ARCHITECTURES, TOKENS, make_model

POSITIONS = torch.cat([torch.arange(9), torch.arange(15)]).expand(2, 24)  # two documents a row
TRAINABLE = [name for name, (kind, _) in ARCHITECTURES.items() if kind not in ("gemma3_text", "granite")]


@pytest.mark.parametrize("name", TRAINABLE)
def test_copies_of_all_later_blocks_give_the_full_models_states(name: str) -> None:
    kind, extra = ARCHITECTURES[name]
    model = make_model(kind, **extra).eval()
    block = ExitBlock(model, exit_layer=1, source_layers=[1, 2])
    network = EarlyExitModel(model)
    with torch.no_grad():
        model.get_decoder().norm, norm = torch.nn.Identity(), model.get_decoder().norm
        entering = network.hidden_by_exit(TOKENS, POSITIONS, [1])[1]
        model.get_decoder().norm = norm
        expected = network.hidden_by_exit(TOKENS, POSITIONS, [3])[3]
        torch.testing.assert_close(block(entering, POSITIONS), expected, rtol=0, atol=0)


def test_an_exit_block_shares_no_weight_with_the_model_and_is_named_apart() -> None:
    model = make_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    blocks = exit_blocks_of(model, {2: [2], 1: [1, 2]})
    assert list(blocks) == ["1", "2"]
    for parameter in blocks.parameters():
        torch.nn.init.zeros_(parameter)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert {name.split(".")[2] for name in blocks.state_dict()} == {"layers", "norm"}


@pytest.mark.parametrize("name", TRAINABLE)
def test_an_affine_start_gives_the_states_of_that_map_up_to_their_sizes_in_training_and_decoding(name: str) -> None:
    torch.manual_seed(0)
    kind, extra = ARCHITECTURES[name]
    model = make_model(kind, **extra).eval()
    width = model.config.hidden_size
    torch.nn.init.uniform_(model.get_decoder().norm.weight, 0.5, 2.0)
    model.get_decoder().norm.weight.data[3] = 0.0
    entering, weight, bias = torch.randn(2, 24, width), torch.randn(width, width), torch.randn(width)
    weight[3], bias[3] = 0.0, 0.0  # which the norm sets to zero in final states, too
    block = ExitBlock(model, exit_layer=1, source_layers=[2], affine=True).eval()
    block.begin_as(weight.double(), bias.double())
    with torch.no_grad():
        found, expected = block(entering, POSITIONS), torch.nn.functional.linear(entering, weight, bias)
        torch.testing.assert_close(
            found / found.norm(dim=-1, keepdim=True), expected / expected.norm(dim=-1, keepdim=True), rtol=0, atol=1e-5
        )
        decoder = SpanDecoder(model, exit_blocks={1: block})
        passed = decoder.run_blocks(entering, start=3, stop=4, cache=decoder.new_cache(batch_size=2, capacity=24))
        assert torch.equal(passed, entering)
        logits = decoder.unembed(passed, exit_layer=1)
        torch.testing.assert_close(logits, model.get_output_embeddings()(found), rtol=0, atol=1e-5)


def test_blocks_without_a_llamas_parts_are_refused_an_affine_start() -> None:
    model = make_model("llama")
    del model.model.layers[1].mlp.down_proj
    with pytest.raises(ConfigError, match=r"exit_blocks.start: got 'affine', allowed exit or last"):
        ExitBlock(model, exit_layer=1, source_layers=[1], affine=True)


@pytest.mark.parametrize(
    ("start", "num_blocks", "expected"),
    [("exit", 2, [2, 3]), ("last", 2, [10, 11]), ("last", 0, []), ("affine", 1, [2])],
)
def test_the_blocks_that_an_exit_begins_as(start: str, num_blocks: int, expected: list[int]) -> None:
    assert source_layers(12, exit_layer=2, num_blocks=num_blocks, start=start) == expected  # type: ignore[arg-type]


def test_an_exit_outside_the_model_is_refused() -> None:
    model = make_model("llama")
    for exit_layer, layers in ((0, [1]), (3, [1]), (1, [3])):
        with pytest.raises(ConfigError):
            ExitBlock(model, exit_layer=exit_layer, source_layers=layers)
    with pytest.raises(ConfigError, match="num_blocks"):
        source_layers(3, exit_layer=2, num_blocks=2, start="last")
