"""The weights of a checkpoint, read tensor by tensor from a single file or from a directory of shards.

Opening reads nothing but metadata, so that neither a 70B checkpoint nor one with optimizer states needs their memory.
"""

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from app.checkpoints.shards import METADATA_FILE, Shards, existing_part
from app.errors import CheckpointError, ConfigError
from app.model.lora import LoraSettings, adapters_of, merged_shapes, merged_weight
from app.text.tokenizer_files import tokenizer_from_files

# What LayerSkipModule adds to a Lightning checkpoint, so that it is enough to decode with and to resume from.
HF_CONFIG_KEY = "hf_config"
SKIPPED_STEPS_KEY = "skipped_steps"  # the steps whose loss was not finite
TOKENIZER_KEY = "tokenizer_files"
STATE_DICT_PREFIX = "model."  # of LayerSkipModule.model
EXIT_BLOCKS_KEY = "exit_blocks"  # exit layer -> which of the model's blocks its own began as; none without exit blocks
EXIT_BLOCKS_PREFIX = "exit_blocks."  # of LayerSkipModule.exit_blocks
LORA_KEY = "lora"  # the settings of LoRA; none without
ADAPTERS_KEY = "adapters"  # in the metadata of an open checkpoint, the adapters that were merged, by their names

STATE_DICT = "state_dict"
OPTIMIZER_STATES = "optimizer_states"
CONTENT_FILE = "meta.pt"  # Lightning's name for the file of a directory that holds what is not in shards

Shapes = Mapping[str, tuple[torch.Size, torch.dtype]]


@dataclass(frozen=True)
class TrainedWeights:
    """A checkpoint of LayerSkipModule, open for reading.

    Attributes:
        metadata: Everything else but the optimizer states: global_step, loops, states of callbacks and data. With exit
            blocks, also their weights, by EXIT_BLOCKS_PREFIX; with LoRA, the adapters, by ADAPTERS_KEY.
        shapes: Shape and dtype of every weight, by Hugging Face name.
        read: Reads the weight of a name, or raises CheckpointError if it is damaged. From a single file, it gives a
            private map of the file, which takes memory when it is used. Adapters of LoRA are merged.
    """

    path: Path
    config: PreTrainedConfig
    metadata: Mapping[str, Any]
    shapes: Shapes
    read: Callable[[str], Tensor]
    _tokenizer_files: Mapping[str, str] | None = field(repr=False)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the run, or None if its data had none. Raises CheckpointError if it is damaged."""
        if self._tokenizer_files is None:
            return None
        try:
            return tokenizer_from_files(self._tokenizer_files)
        except Exception as error:  # readers of tokenizers can raise anything
            raise CheckpointError.unusable(self.path, "its tokenizer is damaged", error) from error


def is_trained_weights(path: str | Path) -> bool:
    """Whether `path` looks like a checkpoint of `layerskip fit`: a `.ckpt` file, or a directory of shards."""
    path = Path(path)
    if path.is_dir():
        return any((path / name).is_file() for name in (METADATA_FILE, CONTENT_FILE))
    return path.suffix == ".ckpt" and path.is_file()


def open_trained_weights(path: str | Path) -> TrainedWeights:
    """Open a checkpoint that `layerskip fit` wrote. Call `integrity.check_bytes` before its weights are read.

    CheckpointError if it is damaged, incomplete or foreign, or holds anything but tensors and plain values.
    """
    path = Path(path)
    content = read_plain(path, mmap=True)
    shapes, read = _take_weights(path, content)
    if HF_CONFIG_KEY not in content:
        raise CheckpointError(f"checkpoint {path}: not written by LayerSkipModule (no {HF_CONFIG_KEY!r} in it)")
    if not shapes:
        raise CheckpointError.unusable(path, "all weights of the model are missing")
    try:
        config = AutoConfig.for_model(**content.pop(HF_CONFIG_KEY))
    except Exception as error:  # transformers' validation can raise anything
        raise CheckpointError.unusable(path, f"its {HF_CONFIG_KEY!r} is damaged", error) from error
    tokenizer_files = content.pop(TOKENIZER_KEY, None)
    return TrainedWeights(path, config, content, shapes, read, tokenizer_files)


def _take_weights(path: Path, content: dict[str, Any]) -> tuple[Shapes, Callable[[str], Tensor]]:
    """The shapes of the weights and what reads one; those of a single file are taken out of its content."""
    if path.is_dir():
        shards = open_shards(path)
        return shards.shapes, shards.read
    state_dict = content.pop(STATE_DICT, None)
    content.pop(OPTIMIZER_STATES, None)
    if EXIT_BLOCKS_KEY in content and isinstance(state_dict, dict):
        content[EXIT_BLOCKS_PREFIX] = _without_prefix(state_dict, EXIT_BLOCKS_PREFIX)
    if not isinstance(state_dict, dict):
        raise CheckpointError(f"checkpoint {path}: not a Lightning checkpoint (no {STATE_DICT!r} in it)")
    weights = _without_prefix(state_dict, STATE_DICT_PREFIX)
    if adapters := adapters_of(weights):
        content[ADAPTERS_KEY] = adapters
    return merged_shapes(weights), partial(merged_weight, weights, scale=_lora_scale(path, content))


def _lora_scale(path: Path, content: Mapping[str, Any]) -> float:
    """How strong the adapters of a checkpoint are; of no effect where it has none."""
    try:
        return LoraSettings(**content.get(LORA_KEY, {})).scale
    except (ConfigError, TypeError) as error:
        raise CheckpointError.unusable(path, f"its {LORA_KEY!r} is damaged", error) from error


def _without_prefix(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): each for name, each in state_dict.items() if name.startswith(prefix)}


def open_shards(path: Path) -> Shards:
    """The weights in a checkpoint directory, by Hugging Face name."""
    return Shards(path, prefix=f"{STATE_DICT}.{STATE_DICT_PREFIX}")


def read_plain(path: Path, *, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """What Lightning wrote to a file, or to a directory beside its shards, as by `torch.load`; nothing in it is run.

    CheckpointError if it is missing, truncated or damaged, or holds anything but tensors and plain values.
    """
    if path.is_dir():
        path = existing_part(path, CONTENT_FILE)
    try:
        content = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        found = "damaged, or holds objects that are not plain tensors and values"
        raise CheckpointError.unusable(path, found) from error
    except Exception as error:  # damaged bytes can raise anything
        raise CheckpointError.unusable(path, "truncated, damaged or not a Lightning checkpoint", error) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"checkpoint {path}: not a Lightning checkpoint")
    return content
