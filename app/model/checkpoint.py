"""Models in: a configuration, a Hugging Face directory, a .gguf file or a Lightning checkpoint of ours."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging

from app.errors import CheckpointError, ConfigError
from app.model.decoding_defaults import read_generation_config
from app.model.gguf import open_gguf, read_gguf_weights
from app.model.tokenizer_files import check_fits, load_tokenizer, tokenizer_from_files
from app.model.tokenizer_files import tokenizer_to_files as tokenizer_to_files  # passed on to app.training

# What a Lightning checkpoint carries beside the weights, so that one file is enough to decode with.
HF_CONFIG_KEY = "hf_config"
TOKENIZER_KEY = "tokenizer_files"
STATE_DICT_PREFIX = "model."  # LayerSkipModule.model

DIRECTORIES = "a Hugging Face directory (or hub id) with config.json and safetensors weights"
_FILES = (".gguf", ".ckpt")
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
# Reads the weights in a dtype (None: their own); returns the model and what transformers says about the loading.
_ReadWeights = Callable[[torch.dtype | None], tuple[PreTrainedModel, dict[str, Any]]]


def build_model(config: PreTrainedConfig, *, seed: int) -> PreTrainedModel:
    """A randomly initialised causal LM in fp32; the weights depend on `config` and `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
        except (ValueError, TypeError, ZeroDivisionError, RuntimeError) as error:
            raise ConfigError(
                "config", got=config.model_type, allowed="a model that can be built", fix=str(error)
            ) from error


def load_config(path: str, *, field: str = "pretrained", allowed: str = DIRECTORIES) -> PreTrainedConfig:
    """The architecture of a Hugging Face directory or hub id, without its weights.

    Args:
        path: Directory or hub id.
        field: The setting that `path` comes from, for error messages.
        allowed: What else that setting takes, for error messages.

    Raises:
        ConfigError: If there is no such model.
    """
    directory = Path(path)
    if directory.is_dir():
        if not (directory / CONFIG_NAME).is_file():
            raise ConfigError(field, got=path, allowed=allowed, fix="there is no config.json in this directory")
    elif directory.exists():
        kind = f"ending in {directory.suffix!r}" if directory.suffix else "without an ending"
        raise ConfigError(field, got=path, allowed=allowed, fix=f"files {kind} are not known")
    elif directory.suffix in _FILES or not _HUB_ID.fullmatch(path):
        raise ConfigError(field, got=path, allowed=allowed, fix="no such file or directory")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # of a file that comes from anywhere, or of the network
        absent = "" if directory.is_dir() else "no such directory here, nor on the hub: "
        fix = absent + textwrap.shorten(str(error), 300)
        raise ConfigError(field, got=path, allowed=allowed, fix=fix) from error


def load_pretrained(
    path: str, *, dtype: torch.dtype | None = torch.float32, field: str = "pretrained"
) -> PreTrainedModel:
    """A causal LM from a local Hugging Face directory or a hub id; safetensors only, no remote code.

    Raises:
        ConfigError: If there is no such model, or only pickled weights.
        CheckpointError: If its weights are damaged or not all there.
    """
    _check_weight_files(Path(path), field=field)
    return _complete(path, *_read_pretrained(path, dtype, field=field))


def _check_weight_files(directory: Path, *, field: str) -> None:
    if not directory.is_dir() or (directory / SAFE_WEIGHTS_NAME).is_file():
        return
    index = directory / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        fix = "there are none"
        if {file.suffix for file in directory.iterdir()} & {".bin", ".pt", ".pth"}:
            fix = "there are pickled ones only, which can run code: where you trust them, save_pretrained converts them"
        raise ConfigError(field, got=str(directory), allowed="a directory with safetensors weights", fix=fix)
    try:
        shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: damaged, not an index of safetensors files ({error})") from error
    missing = sorted(name for name in shards if not (directory / name).is_file())
    if missing:
        raise CheckpointError(f"{directory}: {len(missing)} of {len(shards)} weight files are missing: {missing}")


def _read_pretrained(path: str, dtype: torch.dtype | None, *, field: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    try:
        with _no_progress_bar():
            return AutoModelForCausalLM.from_pretrained(  # type: ignore[no-any-return]
                path,
                dtype=dtype or "auto",
                use_safetensors=True,
                trust_remote_code=False,
                attn_implementation="sdpa",
                output_loading_info=True,
            )
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(field, got=path, allowed=DIRECTORIES, fix=textwrap.shorten(str(error), 300)) from error
    except (SafetensorError, RuntimeError) as error:
        reason = textwrap.shorten(str(error), 300)
        raise CheckpointError(
            f"{path}: the weights are damaged or of another shape than config.json says ({reason})"
        ) from error


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()


def _complete(path: str, model: PreTrainedModel, info: Mapping[str, Any]) -> PreTrainedModel:
    """The model, or CheckpointError: transformers would draw missing weights at random."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(f"{path}: {len(missing)} weights of the model are missing, the first is {missing[0]}")
    return model


def load_for_decoding(path: str, *, dtype: torch.dtype | None, field: str = "model") -> tuple[PreTrainedModel, Any]:
    """Model in eval mode and tokenizer; whatever is cheap to check is checked before the weights are read.

    Args:
        path: Hugging Face directory, hub id, `.gguf` file, or Lightning checkpoint (`.ckpt`) of ours.
        dtype: Of the weights; None keeps those of the checkpoint (float32 for GGUF).
        field: The setting that `path` comes from, for error messages.

    Raises:
        ConfigError: If there is no model there that can be decoded with, or its tokenizer does not fit it.
        CheckpointError: If a file is damaged or incomplete.
    """
    config, tokenizer, read_weights = _open(path, field=field)
    check_fits(tokenizer, vocab_size=config.get_text_config().vocab_size, field=field, got=path)
    return _complete(path, *read_weights(dtype)).eval(), tokenizer


def _open(path: str, *, field: str) -> tuple[PreTrainedConfig, Any, _ReadWeights]:
    file = Path(path)
    if file.suffix == ".ckpt" and file.is_file():
        return _open_lightning(file)
    if file.suffix == ".gguf" and file.is_file():
        config, tokenizer = open_gguf(file, field=field)
        return config, tokenizer, lambda dtype: read_gguf_weights(file, config, dtype=dtype)
    config = load_config(path, field=field, allowed=f"{DIRECTORIES}, a .gguf file, or a .ckpt file of layerskip fit")
    _check_weight_files(file, field=field)
    if (file / "generation_config.json").is_file():
        read_generation_config(file)  # transformers passes over a damaged one, and with it over where a text ends
    return config, load_tokenizer(path, field=field), partial(_read_pretrained, path, field=field)


def _open_lightning(path: Path) -> tuple[PreTrainedConfig, Any, _ReadWeights]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {path} is truncated, damaged or not a Lightning checkpoint ({error})"
        ) from error
    if HF_CONFIG_KEY not in checkpoint:
        raise CheckpointError(f"checkpoint {path}: not written by LayerSkipModule (no {HF_CONFIG_KEY!r} in it)")
    if TOKENIZER_KEY not in checkpoint:
        raise CheckpointError(f"checkpoint {path}: holds no tokenizer ({TOKENIZER_KEY!r}), so it cannot read a prompt")
    config = AutoConfig.for_model(**checkpoint[HF_CONFIG_KEY])
    weights = hf_state_dict(checkpoint["state_dict"])

    def read_weights(dtype: torch.dtype | None) -> tuple[PreTrainedModel, dict[str, Any]]:
        own = next((tensor.dtype for tensor in weights.values() if tensor.is_floating_point()), None)
        with _no_progress_bar():
            return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(  # type: ignore[no-any-return]
                None,
                config=config,
                state_dict=weights,
                dtype=dtype or own,
                attn_implementation="sdpa",
                output_loading_info=True,
            )

    return config, tokenizer_from_files(checkpoint[TOKENIZER_KEY]), read_weights


def hf_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The Hugging Face names of a LayerSkipModule's weights."""
    return {name.removeprefix(STATE_DICT_PREFIX): tensor for name, tensor in state_dict.items()}


def check_compatible(config: PreTrainedConfig, checkpoint: Mapping[str, Any]) -> None:
    """Raise CheckpointError, naming the settings, if `checkpoint` holds a model of another shape than `config`."""
    saved = checkpoint.get(HF_CONFIG_KEY)
    if saved is None:
        raise CheckpointError(f"the checkpoint was not written by LayerSkipModule (no {HF_CONFIG_KEY!r} in it)")
    current = config.to_dict()
    shaping = (
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "tie_word_embeddings",
    )
    differing = [
        f"{key} {saved.get(key)!r} (config: {current.get(key)!r})"
        for key in shaping
        if saved.get(key) != current.get(key)
    ]
    if differing:
        raise CheckpointError(
            f"the checkpoint holds a model of another shape: {', '.join(differing)}; use the run's own config.yaml"
        )
