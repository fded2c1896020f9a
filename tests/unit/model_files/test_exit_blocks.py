"""Exit blocks beside a model: they come back as they were, for that model alone."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from app.errors import CheckpointError
from app.generation.loaded_model import load_decoder
from app.model.exit_block import exit_blocks_of
from app.model_files.exit_blocks import EXIT_BLOCKS_FILE, StoredExitBlocks, load_exit_blocks
from tests.support.tiny_models import tiny_llama
from tests.support.tokenizers import byte_level

SOURCES = {1: [3], 2: [2, 3], 3: []}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    tokenizer = byte_level()
    model = tiny_llama(vocab_size=len(tokenizer))
    blocks = exit_blocks_of(model, SOURCES, affine={2})
    for parameter in blocks.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / EXIT_BLOCKS_FILE).write_bytes(
        StoredExitBlocks(blocks.state_dict(), SOURCES, None).as_file(model.state_dict())
    )
    return tmp_path


def rewrite(directory: Path, **metadata: str | None) -> None:
    file = directory / EXIT_BLOCKS_FILE
    state = load_file(file)
    sources = json.dumps(SOURCES)
    entries = {"layerskip_exit_blocks": "1", "source_layers": sources, "weights_hashes": "{}"} | metadata
    save_file(state, file, {name: value for name, value in entries.items() if value is not None})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_exit_blocks_come_back_in_the_models_type_and_plain_transformers_passes_them_by(
    directory: Path, dtype: str
) -> None:
    loaded = load_decoder(str(directory), dtype=dtype, device="cpu")
    stored = load_file(directory / EXIT_BLOCKS_FILE)
    blocks = load_exit_blocks(str(directory), loaded.model)
    assert {exit_layer: list(block.source_layers) for exit_layer, block in blocks.items()} == SOURCES
    for name, tensor in torch.nn.ModuleDict({str(e): block for e, block in blocks.items()}).state_dict().items():
        assert torch.equal(tensor, stored[name].to(loaded.model.dtype))
    assert loaded.decoder.own_exits == (1, 2, 3)
    assert not any(block.training for block in blocks.values())
    assert [len(loaded.decoder.exit_span(exit_layer)) for exit_layer in SOURCES] == [1, 2, 0]
    assert AutoModelForCausalLM.from_pretrained(directory).state_dict().keys() == tiny_llama().state_dict().keys()


def test_a_model_without_the_file_has_none(directory: Path) -> None:
    (directory / EXIT_BLOCKS_FILE).unlink()
    assert load_decoder(str(directory), dtype="auto", device="cpu").decoder.own_exits == ()


def test_a_file_beside_another_model_is_refused(directory: Path) -> None:
    model = tiny_llama(vocab_size=len(byte_level()))
    with torch.no_grad():  # of a block that no exit depends on
        model.model.layers[3].mlp.up_proj.weight[0, 0] += 1.0
    model.save_pretrained(directory)
    assert load_exit_blocks(str(directory), model)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] += 1.0
    model.save_pretrained(directory)
    with pytest.raises(CheckpointError, match=r"blocks below 3.* are not those that exit 3 was trained for"):
        load_decoder(str(directory), dtype="auto", device="cpu")


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({"layerskip_exit_blocks": "2"}, "its format is '2', and 1 is known"),
        ({"layerskip_exit_blocks": None}, "its format is None, and 1 is known"),
        ({"source_layers": "[3]"}, "damaged"),
        ({"source_layers": "{}"}, "not of this architecture"),
        ({"source_layers": '{"1": [9]}'}, "not of this architecture"),
        ({"source_layers": '{"x": [1]}'}, "damaged"),
        ({"source_layers": '{"1": [3]}'}, "not of this architecture"),
        ({"source_layers": None}, "damaged"),
        ({"weights_hashes": "{"}, "damaged"),
        ({}, "are not those that exit 1 was trained for"),
    ],
)
def test_metadata_that_say_something_else_are_refused(
    directory: Path, metadata: dict[str, str | None], told: str
) -> None:
    rewrite(directory, **metadata)
    with pytest.raises(CheckpointError, match=told):
        load_exit_blocks(str(directory), tiny_llama(vocab_size=len(byte_level())))


def test_damaged_bytes_and_weights_that_are_not_finite_are_refused(directory: Path) -> None:
    file, model = directory / EXIT_BLOCKS_FILE, tiny_llama(vocab_size=len(byte_level()))
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    with pytest.raises(CheckpointError, match="damaged"):
        load_exit_blocks(str(directory), model)
    file.unlink()
    file.symlink_to("gone")
    with pytest.raises(CheckpointError, match="damaged"):
        load_exit_blocks(str(directory), model)
    file.unlink()
    blocks = exit_blocks_of(model, SOURCES)
    torch.nn.init.constant_(blocks["2"].decoder.norm.weight, torch.nan)
    file.write_bytes(StoredExitBlocks(blocks.state_dict(), SOURCES, None).as_file(model.state_dict()))
    with pytest.raises(CheckpointError, match="not finite"):
        load_exit_blocks(str(directory), model)
