"""Checkpoints of ours, written without training."""

import json
import zlib
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from app.checkpoints.integrity import MANIFEST_FILE, Checksum, manifest
from app.checkpoints.weights import HF_CONFIG_KEY, STATE_DICT_PREFIX, TOKENIZER_KEY
from app.text.tokenizer_files import tokenizer_to_files


def write_checkpoint(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **other: object) -> str:
    """What LayerSkipModule saves, as one file."""
    content = {
        HF_CONFIG_KEY: json.loads(model.config.to_json_string(use_diff=False)),
        TOKENIZER_KEY: tokenizer_to_files(tokenizer),
        "global_step": 3,
        "state_dict": {f"{STATE_DICT_PREFIX}{name}": tensor for name, tensor in model.state_dict().items()},
    }
    torch.save(content | other, path)
    return str(path)


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
