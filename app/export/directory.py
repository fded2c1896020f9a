"""Writes a model as a Hugging Face directory that plain transformers loads, file by file."""

import copy
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from app.checkpoints.integrity import check_finite
from app.errors import CheckpointError, ConfigError
from app.export.output_directory import whole_or_absent
from app.model.process_memory import give_back_freed
from app.model_files.decoding_defaults import DecodingDefaults, write_decoding_defaults
from app.model_files.generation_config import saveable
from app.model_files.loading import check_plain
from app.words import dtype_name

_SHARD_NAMES = "model{suffix}.safetensors"


class Weights(NamedTuple):
    """Shapes and dtypes of tensors by Hugging Face name, a function that reads one of them, and where they are from."""

    shapes: Mapping[str, tuple[torch.Size, torch.dtype]]
    read: Callable[[str], Tensor]
    path: str | Path  # or words, for messages

    @classmethod
    def of(cls, model: PreTrainedModel, path: str | None = None) -> "Weights":
        state, path = model.state_dict(), path or f"the weights of a {type(model).__name__}"
        return cls({name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}, state.__getitem__, path)

    def with_others(self, state: Mapping[str, Tensor]) -> "Weights":
        others = {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}
        read = lambda name: state[name] if name in state else self.read(name)  # noqa: E731
        return self._replace(shapes={**self.shapes, **others}, read=read)


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What a user chooses about an export."""

    dtype: torch.dtype | None = None  # of floating-point weights; None keeps that of each
    max_shard_size: str = "5GB"  # of a file, in KB, MB, GB or TB; a single weight may be larger
    decoding: DecodingDefaults | None = None  # None keeps the defaults that the model brings
    readme: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[1-9]\d*[KMGT]B", self.max_shard_size, re.IGNORECASE):
            allowed = "digits and a unit, such as 5GB or 500MB"
            raise ConfigError("max_shard_size", got=self.max_shard_size, allowed=allowed)


def architecture(config: PreTrainedConfig, generation: GenerationConfig | None = None) -> PreTrainedModel:
    """Return a model on the meta device with this generation config, or else the one that `config` implies."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    if generation is not None:
        model.generation_config = generation
    return model


def write_pretrained(
    model: PreTrainedModel,
    tokenizer: Any,
    directory: Path,
    *,
    weights: Weights | None = None,
    settings: ExportSettings | None = None,
    beside: Mapping[str, bytes] | None = None,
) -> int:
    """Write configurations, safetensors, tokenizer and README.md, byte for byte as `save_pretrained` would, or nothing.

    At most one file of weights is in memory at a time, beside what `weights` itself holds. If the generation config
    has no end of text, that of the tokenizer is written. Returns the number of files of weights.

    Args:
        model: The model, which may be on the meta device where `weights` are given.
        directory: Output of `check_output_dir`.
        weights: The tensors to write; by default those of `model`.
        beside: Contents of further files, by name.

    Raises:
        CheckpointError: The directory cannot be written, `weights` are not those of the model or not finite, or its
            generation config contradicts itself.
    """
    settings, weights = settings or ExportSettings(), weights or Weights.of(model)
    names = _stored_names(model, weights)
    config, generation = copy.deepcopy(model.config), saveable(model.generation_config)
    config.architectures = [type(model).__name__]
    config.dtype = dtype_name(exported_dtype(weights, settings.dtype))
    if tokenizer is not None and generation.eos_token_id is None:
        generation.eos_token_id = tokenizer.eos_token_id
    with whole_or_absent(directory, readme=settings.readme) as folder:
        num_files = _write_shards(model, names, weights, folder, settings=settings)
        config.save_pretrained(folder)
        generation.save_pretrained(folder)
        if settings.decoding is not None:
            write_decoding_defaults(folder, settings.decoding)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        for name, content in (beside or {}).items():
            (folder / name).write_bytes(content)
    return num_files


def exported_dtype(weights: Weights, dtype: torch.dtype | None) -> torch.dtype:
    """Return the type that `write_pretrained` notes for weights: `dtype`, or for None that of the first one."""
    own = (own for _, own in weights.shapes.values() if own.is_floating_point)
    return dtype or next(own, torch.float32)


def _stored_names(model: PreTrainedModel, weights: Weights) -> list[str]:
    """List the names of the model's weights, in its order, without those that are tied to another."""
    own, shapes = model.state_dict(), weights.shapes
    tied = model.all_tied_weights_keys
    names = [name for name in own if name not in tied]
    if unknown := sorted(shapes.keys() - own.keys()):
        what = f"{len(unknown)} weights are not of a {type(model).__name__}, the first is {unknown[0]}"
        raise CheckpointError(f"{weights.path}: {what}")
    for name in names:
        if name not in shapes:
            raise CheckpointError(f"{weights.path}: {name} of a {type(model).__name__} is missing")
        if shapes[name][0] != own[name].shape:
            what = f"{name} has shape {[*shapes[name][0]]}, config.json says {[*own[name].shape]}"
            raise CheckpointError(f"{weights.path}: {what}")
        if own[name].is_floating_point():
            check_plain(weights.path, name, shapes[name][1])
    return names


def _write_shards(
    model: PreTrainedModel, names: list[str], weights: Weights, folder: Path, *, settings: ExportSettings
) -> int:
    shapes, read = weights.shapes, weights.read
    own = {name: shapes[name][1] for name in names}
    dtypes = {name: (settings.dtype if dtype.is_floating_point else None) or dtype for name, dtype in own.items()}
    planned = {name: torch.empty(shapes[name][0], dtype=dtypes[name], device="meta") for name in names}
    size = settings.max_shard_size
    shards = split_torch_state_dict_into_shards(planned, filename_pattern=_SHARD_NAMES, max_shard_size=size)
    for file, members in shards.filename_to_tensors.items():
        tensors = {name: read(name).detach().to(dtypes[name]).contiguous() for name in members}
        check_finite(weights.path, tensors)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        del tensors
        give_back_freed()
    if shards.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **shards.metadata}
        index = json.dumps({"metadata": metadata, "weight_map": shards.tensor_to_filename}, indent=2, sort_keys=True)
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(index + "\n", "utf-8")
    return len(shards.filename_to_tensors)
