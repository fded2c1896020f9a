"""A checkpoint that two FSDP2 ranks wrote in parts becomes one Hugging Face model, in one process."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.checkpoints.weights import open_trained_weights
from tests.support.distributed import is_sharded, whole_weights
from tests.support.processes import run_ranks
from tests.support.runs import NUM_LAYERS, cli, curricula, make_data, make_module, make_trainer
from tests.support.tiny_models import tiny_config
from tests.unit.export.test_directory import added_megabytes


def train(root: Path, shape: dict[str, object], max_steps: int):
    """Two ranks; the directory they write, and the weights as gathered from them."""
    trainer = make_trainer(
        root,
        max_steps=max_steps,
        limit_train_batches=max_steps,
        callbacks=curricula(),
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=True),
    )
    settings = {"num_layers": NUM_LAYERS, "vocab_size": 300, "max_length": 128}
    module = make_module(
        config=tiny_config(**(settings | shape)), optimizer=lambda params: torch.optim.SGD(params, lr=0.1)
    )
    trainer.fit(module, datamodule=make_data(root, num_lanes=2))
    trainer.save_checkpoint(root / "run.ckpt")
    return {"sharded": any(map(is_sharded, module.parameters())), "weights": whole_weights(module.model)}


def train_large(root: Path):
    """As `train`; the weights stay on the ranks."""
    return train(root, {"hidden_size": 768, "tied": False}, 1)["sharded"]


@pytest.mark.distributed
@pytest.mark.parametrize("tied", [True, False])
def test_the_parts_of_two_ranks_become_one_model(tied, tmp_path, monkeypatch, capsys):
    make_data(tmp_path).prepare_data()
    first, _ = run_ranks(train, tmp_path, {"tied": tied}, 3)
    checkpoint, out = tmp_path / "run.ckpt", tmp_path / "out"
    assert first["sharded"]
    assert len([*checkpoint.glob("*.distcp")]) == 2
    arguments = ["--ckpt_path", str(checkpoint), "--output_dir", str(out), "--max_shard_size", "60KB"]
    assert cli(monkeypatch, "export", *arguments) == 0
    exported = {}
    for file in out.glob("*.safetensors"):
        exported |= load_file(file)
    assert len([*out.glob("*.safetensors")]) > 1
    assert exported.keys() == json.loads((out / "model.safetensors.index.json").read_text())["weight_map"].keys()
    assert ("lm_head.weight" in exported) == (not tied)
    assert exported.keys() == first["weights"].keys()
    for name, tensor in exported.items():
        assert torch.equal(tensor, torch.as_tensor(first["weights"][name])), name
    model = AutoModelForCausalLM.from_pretrained(out)
    assert AutoTokenizer.from_pretrained(out).eos_token_id == model.generation_config.eos_token_id is not None
    assert "| optimizer steps | 3 |" in (out / "README.md").read_text()


@pytest.mark.distributed
def test_no_whole_copy_is_made_of_parts(tmp_path):
    make_data(tmp_path).prepare_data()
    assert all(run_ranks(train_large, tmp_path))
    weights = open_trained_weights(tmp_path / "run.ckpt")
    megabytes = sum(shape.numel() * dtype.itemsize for shape, dtype in weights.shapes.values()) / 2**20
    assert megabytes > 75
    in_parts = added_megabytes(tmp_path / "run.ckpt", tmp_path / "parts", max_shard_size="12MB")
    at_once = added_megabytes(tmp_path / "run.ckpt", tmp_path / "one", max_shard_size="5GB")
    assert in_parts < megabytes * 0.6 < megabytes * 0.9 < at_once  # the latter shows that the measurement can tell
    assert (tmp_path / "one" / "model.safetensors").is_file()
