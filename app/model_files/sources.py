"""Where models come from: each kind of place found and checked before any weight is read."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

from app.checkpoints.weights import TOKENIZER_KEY, is_trained_weights, open_trained_weights
from app.errors import CheckpointError, ConfigError, check_range
from app.model.config_check import check_plain_head, check_sizes
from app.model_files.gguf import read_gguf_config, read_gguf_tokenizer, read_gguf_weights
from app.model_files.loading import fill_model
from app.model_files.paths import SOURCES, check_exists
from app.model_files.trained_generation import stored_generation_config, trained_generation_config
from app.model_files.weight_files import check_weight_files, conversion, from_checkpoint, from_safetensors, is_pickle
from app.text.tokenizer_files import load_tokenizer

_OWN_CODE = (
    "it brings Python code of its own (auto_map in config.json), which could do anything and is never run: "
    "take a model of an architecture that transformers has itself"
)
_MOST_LABELS = 2**20


class Source(NamedTuple):
    """A model that was found, and checked as far as is cheap.

    Attributes:
        config: Architecture.
        tokenizer: Reads it.
        weights: Reads them in a dtype (None: their own), into memory of their own if that is asked for.
    """

    config: PreTrainedConfig
    tokenizer: Callable[[], Any]
    weights: Callable[[torch.dtype | None, bool], PreTrainedModel]


def open_source(path: str, *, field: str) -> Source:
    """Find a model and check it as far as that is possible without its weights.

    Args:
        path: Hugging Face directory or hub id, `.gguf` file, or checkpoint of ours.
        field: The setting that `path` comes from, for error messages.

    Raises:
        ConfigError: If there is no model there that can be used.
        CheckpointError: If a file is damaged or incomplete.
    """
    file = Path(path)
    if is_trained_weights(file):
        source = _open_checkpoint(file, field=field)
    elif file.suffix == ".gguf" and file.is_file():
        source = _open_gguf(file, field=field)
    else:
        source = _open_pretrained(path, field=field)
    if type(source.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(field, got=type(source.config).__name__, allowed="a causal LM", fix="this is none")
    _check_settings(source.config, path, field=field)
    check_plain_head(source.config, field=field)
    if getattr(source.config, "quantization_config", None) is not None:
        fix = "dequantize it with transformers and save_pretrained it first"
        raise ConfigError(field, got=path, allowed="a model whose weights are not quantized", fix=fix)
    return source


def _check_settings(config: PreTrainedConfig, path: str, *, field: str) -> None:
    try:
        text = config.get_text_config()
        if not isinstance(text, PreTrainedConfig):
            raise ConfigError("text_config", got=text, allowed="the settings of a model of text")
        check_sizes(text)
    except ConfigError as error:
        raise ConfigError(
            field, got=path, allowed="a model that can be built", fix=f"{CONFIG_NAME}: {error}"
        ) from error


def _open_checkpoint(path: Path, *, field: str) -> Source:
    trained = open_trained_weights(path)

    def tokenizer() -> Any:
        if trained.tokenizer is None:
            raise CheckpointError(
                f"checkpoint {path}: holds no tokenizer ({TOKENIZER_KEY!r}), so it cannot read a prompt"
            )
        return trained.tokenizer

    def weights(dtype: torch.dtype | None, own: bool) -> PreTrainedModel:
        stored, generation = from_checkpoint(trained), trained_generation_config(trained)
        return fill_model(trained.config, stored, dtype=dtype, own=own, field=field, generation_config=generation)

    return Source(trained.config, tokenizer, weights)


def _open_gguf(path: Path, *, field: str) -> Source:
    config = read_gguf_config(path, field=field)

    def weights(dtype: torch.dtype | None, own: bool) -> PreTrainedModel:  # noqa: ARG001  # unpacked: always its own
        return read_gguf_weights(path, config, dtype=dtype, field=field)

    return Source(config, lambda: read_gguf_tokenizer(path), weights)


def _open_pretrained(path: str, *, field: str) -> Source:
    config = _read_config(path, field=field)

    def weights(dtype: torch.dtype | None, own: bool) -> PreTrainedModel:
        directory = Path(path) if Path(path).is_dir() else _download(path, field=field)
        check_weight_files(directory, field=field)
        generation = stored_generation_config(directory, config)
        stored = from_safetensors(directory)
        return fill_model(config, stored, dtype=dtype, own=own, field=field, generation_config=generation)

    return Source(config, lambda: load_tokenizer(path, field=field), weights)


def _read_config(path: str, *, field: str) -> PreTrainedConfig:
    directory = Path(path)
    if directory.is_dir():
        if not (directory / CONFIG_NAME).is_file():
            raise ConfigError(field, got=path, allowed=SOURCES, fix="there is no config.json in this directory")
        if (directory / ADAPTER_CONFIG_NAME).is_file():
            fix = "merge the adapter into its model first: peft's merge_and_unload, then save_pretrained"
            raise ConfigError(field, got=path, allowed=SOURCES, fix=fix)
    elif directory.exists():
        if is_pickle(directory):
            fix = f"pickled weights can run code; {conversion(directory.parent)}"
            raise ConfigError(field, got=path, allowed=SOURCES, fix=fix)
        if directory.suffix == ".safetensors":
            fix = f"give its directory, where config.json is: {directory.parent}"
            raise ConfigError(field, got=path, allowed=SOURCES, fix=fix)
        kind = f"ending in {directory.suffix!r}" if directory.suffix else "without an ending"
        raise ConfigError(field, got=path, allowed=SOURCES, fix=f"files {kind} are not known")
    else:
        check_exists(path, field=field)
    try:
        if directory.is_dir():
            _check_object(directory / CONFIG_NAME)
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # of a file that comes from anywhere, or of the network
        absent = f"{CONFIG_NAME}: " if directory.is_dir() else "no such directory here, nor on the hub: "
        fix = absent + (_OWN_CODE if "trust_remote_code" in str(error) else _reason(error))
        raise ConfigError(field, got=path, allowed=SOURCES, fix=fix) from error


def _check_object(file: Path) -> None:
    """Raise an error unless the file is a JSON object of which transformers can make a configuration in good time."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a valid JSON file ({error})") from error
    if not isinstance(content, dict):
        raise TypeError("not a JSON object")
    if type(labels := content.get("num_labels")) is int:  # each gets a name
        check_range("num_labels", labels, low=0, high=_MOST_LABELS)


def _reason(error: Exception) -> str:
    """What happened, without the hub's advice on settings of its own."""
    return textwrap.shorten(str(error).partition("\nCheck your internet connection")[0], 300)


def _download(hub_id: str, *, field: str) -> Path:
    """The hub's safetensors of a model and how it generates, in the local cache."""
    patterns = [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, "model-*.safetensors", GENERATION_CONFIG_NAME]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:  # of the network, or of the hub
        fix = f"it cannot be downloaded: {_reason(error)}"
        raise ConfigError(field, got=hub_id, allowed=SOURCES, fix=fix) from error
