"""Models in: a configuration, a Hugging Face directory or hub id, a .gguf file or a Lightning checkpoint of ours."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from app.checkpoints.weights import is_trained_weights
from app.errors import CheckpointError, ConfigError
from app.model.config_check import refused_as_config
from app.model_files.sources import open_source
from app.text.tokenizer_files import check_fits, check_knows_tokens, load_tokenizer
from app.text.tokenizer_files import tokenizer_to_files as tokenizer_to_files  # passed on to app.training

_log = logging.getLogger(__name__)


def build_model(config: PreTrainedConfig, *, seed: int) -> PreTrainedModel:
    """A randomly initialised causal LM in fp32; the weights depend on `config` and `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with refused_as_config(config):
            return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)


def load_config(path: str, *, field: str = "pretrained") -> PreTrainedConfig:
    """The architecture of a model that `load_pretrained` can load, without reading its weights.

    Args:
        path: As there.
        field: The setting that `path` comes from, for error messages.

    Raises:
        ConfigError: If there is no such model, or its head does more than multiply.
        CheckpointError: If its file is damaged.
    """
    return open_source(path, field=field).config


def load_pretrained(
    path: str, *, dtype: torch.dtype | None = torch.float32, field: str = "pretrained"
) -> PreTrainedModel:
    """A causal LM to train: every weight in memory of its own, so the files may change from then on.

    Args:
        path: Hugging Face directory or hub id (safetensors only, no remote code), `.gguf` file, or checkpoint of
            ours, of which the weights are taken and nothing else.
        dtype: Of the weights; None keeps those of the checkpoint (float32 for GGUF).
        field: The setting that `path` comes from, for error messages.

    Raises:
        ConfigError: If there is no such model, or only pickled weights, or its head does more than multiply.
        CheckpointError: If its weights are damaged or not all there.
    """
    return open_source(path, field=field).weights(dtype, True)


def load_for_decoding(path: str, *, dtype: torch.dtype | None, field: str = "model") -> tuple[PreTrainedModel, Any]:
    """Model in eval mode and tokenizer; whatever is cheap to check is checked before the weights are read.

    Weights that need no conversion are maps of their files: the model is there once their bytes are checked, and takes
    memory as it runs.

    Args:
        path: As for `load_pretrained`.
        dtype: Of the weights; None keeps those of the checkpoint (float32 for GGUF).
        field: The setting that `path` comes from, for error messages.

    Raises:
        ConfigError: If there is no model there that can be decoded with, or its tokenizer does not fit it.
        CheckpointError: If a file is damaged or incomplete.
    """
    source = open_source(path, field=field)
    tokenizer = source.tokenizer()
    check_fits(tokenizer, vocab_size=source.config.get_text_config().vocab_size, field=field, got=path)
    return source.weights(dtype, False).eval(), tokenizer


def open_tokenizer(path: str, *, field: str) -> Any:
    """The tokenizer that comes with a model, or the one in a folder that holds nothing else.

    Args:
        path: As for `load_pretrained`, or such a folder.
        field: The setting that `path` comes from, for error messages.

    Raises:
        ConfigError: There is none that can be read.
        CheckpointError: A file is damaged, or the checkpoint holds no tokenizer.
    """
    if Path(path).is_dir() and not is_trained_weights(path):
        tokenizer = load_tokenizer(path, field=field)
    else:
        tokenizer = open_source(path, field=field).tokenizer()
    tokenizer.name_or_path = path
    return tokenizer


def check_tokenizer_of(pretrained: str, tokenizer: Any, *, field: str = "tokenizer", got: str) -> None:
    """Refuse to feed a model the ids of a tokenizer that knows its tokens by other ids.

    Where the model comes without a tokenizer that can be read, a warning says that nothing was compared.

    Args:
        pretrained: Where the model comes from, as for `load_pretrained`.
        tokenizer: That is to feed it.
        field: The setting that names the tokenizer.
        got: Its value.

    Raises:
        ConfigError: A token of the model has another id there, or none.
    """
    if tokenizer.name_or_path == pretrained:  # of a GGUF file it takes seconds to read it again
        return
    try:
        own = open_tokenizer(pretrained, field="pretrained")
    except (ConfigError, CheckpointError) as error:
        _log.warning("whether the tokenizer is the model's own cannot be told: %s", error)
        return
    check_knows_tokens(tokenizer, own, field=field, got=got, model=pretrained)
