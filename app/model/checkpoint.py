"""Models in: from a configuration, a Hugging Face directory, or a Lightning checkpoint of ours."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from app.errors import CheckpointError, ConfigError

# What a Lightning checkpoint carries beside the weights, so that one file is enough to decode with.
HF_CONFIG_KEY = "hf_config"
TOKENIZER_KEY = "tokenizer_files"
STATE_DICT_PREFIX = "model."  # LayerSkipModule.model


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


def load_config(path: str) -> PreTrainedConfig:
    """The architecture of a Hugging Face directory or hub id, without its weights."""
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _no_such_model(path, error) from error


def _no_such_model(path: str, error: Exception, *, field: str = "pretrained") -> ConfigError:
    allowed = "a Hugging Face directory (or hub id) with config.json and safetensors weights"
    return ConfigError(field, got=path, allowed=allowed, fix=str(error).splitlines()[0])


def load_pretrained(path: str, *, dtype: torch.dtype = torch.float32, field: str = "pretrained") -> PreTrainedModel:
    """A causal LM from a local Hugging Face directory or a hub id; safetensors only, no remote code.

    Raises:
        ConfigError: If there is no such model, or only pickled weights.
    """
    progress_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, use_safetensors=True, trust_remote_code=False, attn_implementation="sdpa"
        )
    except (OSError, ValueError) as error:
        raise _no_such_model(path, error, field=field) from error
    finally:
        if progress_bar:
            transformers_logging.enable_progress_bar()


def load_for_decoding(path: str, *, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    """Model in eval mode and tokenizer, from a Lightning checkpoint (`*.ckpt`) or a Hugging Face directory."""
    if Path(path).is_file():
        return _load_lightning(Path(path), dtype=dtype)
    model = load_pretrained(path, dtype=dtype, field="model")
    try:
        return model.eval(), AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError("model", got=path, allowed="a directory with a tokenizer in it", fix=str(error)) from error


def _load_lightning(path: Path, *, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {path} is truncated, damaged or not a Lightning checkpoint ({error})"
        ) from error
    if HF_CONFIG_KEY not in checkpoint:
        raise CheckpointError(f"checkpoint {path}: not written by LayerSkipModule (no {HF_CONFIG_KEY!r} in it)")
    settings = dict(checkpoint[HF_CONFIG_KEY])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    model.to_empty(device="cpu")
    model.initialize_weights()  # rotary tables are in no checkpoint; everything else is overwritten below
    model.load_state_dict(hf_state_dict(checkpoint["state_dict"]), strict=True)
    model.tie_weights()
    return model.eval(), tokenizer_from_files(checkpoint[TOKENIZER_KEY])


def hf_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The Hugging Face names of a LayerSkipModule's weights."""
    return {name.removeprefix(STATE_DICT_PREFIX): tensor for name, tensor in state_dict.items()}


def tokenizer_to_files(tokenizer: Any) -> dict[str, str]:
    """A tokenizer as {file name: text}, plain enough for a weights-only checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {file.name: file.read_text("utf-8") for file in sorted(Path(folder).iterdir()) if file.is_file()}


def tokenizer_from_files(files: Mapping[str, str]) -> Any:
    """The inverse of `tokenizer_to_files`."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text, "utf-8")
        return AutoTokenizer.from_pretrained(folder)


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
