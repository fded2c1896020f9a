"""The weights of a checkpoint of ours, tensor by tensor: a single file, or a directory of shards as FSDP2 writes it.

Nothing but metadata is read on opening, so neither a 70B checkpoint nor one with optimizer states needs their memory.
"""

from __future__ import annotations

import pickle
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from app.checkpoints.shards import METADATA_FILE, Shards
from app.errors import CheckpointError
from app.text.tokenizer_files import tokenizer_from_files

# What a Lightning checkpoint carries beside the weights, so that it is enough to decode with.
HF_CONFIG_KEY = "hf_config"
SKIPPED_STEPS_KEY = "skipped_steps"  # those whose loss was not finite
TOKENIZER_KEY = "tokenizer_files"
STATE_DICT_PREFIX = "model."  # LayerSkipModule.model

STATE_DICT = "state_dict"
OPTIMIZER_STATES = "optimizer_states"
CONTENT_FILE = "meta.pt"  # of a directory, by Lightning's name for it: all but what is in shards

Shapes = Mapping[str, tuple[torch.Size, torch.dtype]]


class ReadWeight(Protocol):
    """TrainedWeights.read."""

    def __call__(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The weight of this name."""


@dataclass(frozen=True)
class TrainedWeights:
    """A LayerSkipModule's checkpoint, open for reading.

    Attributes:
        path: Where it is.
        config: Architecture.
        metadata: What else it holds: global_step, loops, states of callbacks and data; no optimizer states.
        shapes: Shape and dtype of every weight, by Hugging Face name.
        read: One weight from the disk, by name and, if wanted, dtype. It raises CheckpointError where its bytes are
            damaged. From a single file a tensor in its own dtype is a private map of the file, not a copy: its memory
            counts only once it is looked at.
    """

    path: Path
    config: PreTrainedConfig
    metadata: Mapping[str, Any]
    shapes: Shapes
    read: ReadWeight
    _tokenizer_files: Mapping[str, str] | None = field(repr=False)

    @cached_property
    def tokenizer(self) -> Any:
        """That of the run; None where its data had none.

        Raises:
            CheckpointError: If it is damaged.
        """
        if self._tokenizer_files is None:
            return None
        try:
            return tokenizer_from_files(self._tokenizer_files)
        except Exception as error:  # its readers raise anything
            reason = textwrap.shorten(str(error), 300)
            raise CheckpointError(f"checkpoint {self.path}: its tokenizer is damaged ({reason})") from error


def is_trained_weights(path: str | Path) -> bool:
    """Whether `path` is a checkpoint of `layerskip fit` by its looks: a `.ckpt` file, or a directory of shards."""
    path = Path(path)
    if path.is_dir():
        return any((path / name).is_file() for name in (METADATA_FILE, CONTENT_FILE))
    return path.suffix == ".ckpt" and path.is_file()


def open_trained_weights(path: str | Path) -> TrainedWeights:
    """Open a checkpoint that `layerskip fit` wrote, without reading its weights; who does, calls `check_bytes` first.

    Args:
        path: A `.ckpt` file, or the directory that ModelParallelStrategy writes.

    Raises:
        CheckpointError: If it is damaged, not all there, not ours, or holds anything but tensors and plain values.
    """
    path = Path(path)
    content, shapes, read = _open_directory(path) if path.is_dir() else _open_file(path)
    if HF_CONFIG_KEY not in content:
        raise CheckpointError(f"checkpoint {path}: not written by LayerSkipModule (no {HF_CONFIG_KEY!r} in it)")
    if not shapes:
        raise CheckpointError(f"checkpoint {path}: all weights of the model are missing")
    try:
        config = AutoConfig.for_model(**content.pop(HF_CONFIG_KEY))
    except Exception as error:  # transformers' validation raises anything
        reason = textwrap.shorten(str(error), 300)
        raise CheckpointError(f"checkpoint {path}: its {HF_CONFIG_KEY!r} is damaged ({reason})") from error
    tokenizer_files = content.pop(TOKENIZER_KEY, None)
    return TrainedWeights(path, config, content, shapes, read, tokenizer_files)


_Opened = tuple[dict[str, Any], Shapes, ReadWeight]


def _open_file(path: Path) -> _Opened:
    content = read_plain(path, mmap=True)
    state_dict = content.pop(STATE_DICT, None)
    content.pop(OPTIMIZER_STATES, None)
    if not isinstance(state_dict, dict):
        raise CheckpointError(f"checkpoint {path}: not a Lightning checkpoint (no {STATE_DICT!r} in it)")
    weights: dict[str, Tensor] = {
        name.removeprefix(STATE_DICT_PREFIX): tensor
        for name, tensor in state_dict.items()
        if name.startswith(STATE_DICT_PREFIX)
    }

    def read(name: str, dtype: torch.dtype | None = None) -> Tensor:
        return weights[name].to(dtype)

    return content, {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}, read


def read_plain(path: Path, *, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """A file that Lightning wrote, as tensors and plain values: nothing in it is run.

    Args:
        path: The file.
        map_location: As torch.load's.
        mmap: Whether tensors stay in the file until they are looked at.

    Raises:
        CheckpointError: If it is truncated, damaged, or holds anything else.
    """
    try:
        content = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path} is damaged, or holds objects that are not plain tensors and values"
        ) from error
    except Exception as error:  # anything can come out of damaged bytes
        reason = textwrap.shorten(str(error), 300)
        raise CheckpointError(
            f"checkpoint {path} is truncated, damaged or not a Lightning checkpoint ({reason}); use an earlier one"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"checkpoint {path}: not a Lightning checkpoint")
    return content


def _open_directory(path: Path) -> _Opened:
    for name in (METADATA_FILE, CONTENT_FILE):
        if not (path / name).is_file():
            raise CheckpointError(f"checkpoint {path}: not all there ({name} is missing); use an earlier one")
    content = read_plain(path / CONTENT_FILE)
    shards = open_shards(path)
    return content, shards.shapes, shards.read


def open_shards(path: Path) -> Shards:
    """The weights in a checkpoint directory, by Hugging Face name, to be read by parts."""
    return Shards(path, prefix=f"{STATE_DICT}.{STATE_DICT_PREFIX}")
