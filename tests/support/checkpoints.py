"""Checkpoints of ours, written without training."""

import json
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from app.checkpoints.integrity import MANIFEST_FILE, Checksum, manifest
from app.checkpoints.weights import HF_CONFIG_KEY, STATE_DICT_PREFIX, TOKENIZER_KEY
from app.text.tokenizer_files import tokenizer_to_files
from tests.support.processes import run_ranks


def write_checkpoint(
    path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, **other: object
) -> str:
    """What LayerSkipModule saves, as one file, with `other` entries; None leaves one out."""
    content = {
        HF_CONFIG_KEY: json.loads(model.config.to_json_string(use_diff=False)),
        TOKENIZER_KEY: tokenizer and tokenizer_to_files(tokenizer),
        "global_step": 3,
        "state_dict": {f"{STATE_DICT_PREFIX}{name}": tensor for name, tensor in model.state_dict().items()},
    }
    torch.save({key: value for key, value in (content | other).items() if value is not None}, path)
    return str(path)


def write_shards(directory: Path, file: str, model: PreTrainedModel, **parts: object) -> None:
    """What ModelParallelStrategy writes: the plain values of `file`, and shards of weights and of other parts."""
    run_ranks(_save_shards, directory, model, parts)
    content = torch.load(file, weights_only=True, mmap=True)
    del content["state_dict"], content["optimizer_states"]
    torch.save(content, directory / "meta.pt")


def _save_shards(directory: Path, model: PreTrainedModel, parts: dict[str, object]) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    weights = {f"model.{name}": distribute_tensor(t, mesh, [Shard(0)]) for name, t in model.state_dict().items()}
    dcp.save({"state_dict": weights, **parts}, checkpoint_id=directory)


def write_manifest(directory: Path) -> None:
    """The checksums of a checkpoint directory as it is."""
    contents = {file.name: file.read_bytes() for file in directory.iterdir() if file.name != MANIFEST_FILE}
    checksums = {name: Checksum(len(content), zlib.crc32(content)) for name, content in contents.items()}
    (directory / MANIFEST_FILE).write_bytes(manifest(1, checksums))


def flip_bit(file: Path, within: bytes) -> None:
    """Damage a file in the middle of what it holds `within`."""
    content = bytearray(file.read_bytes())
    content[content.index(within) + len(within) // 2] ^= 1
    file.write_bytes(content)
