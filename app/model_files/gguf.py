"""Reads GGUF files: unpacks llama.cpp's quantized weights into a plain model. It needs the extra `gguf`."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import is_accelerate_available, is_gguf_available
from transformers.utils import logging as transformers_logging

from app.errors import CheckpointError, ConfigError, shortened
from app.git_lfs import IS_POINTER, is_pointer
from app.model_files.gguf_metadata import check_all_used, obey_metadata
from app.model_files.loading import check_complete

_HUB_URL = re.compile(r"https://huggingface\.co/([\w.-]+/[\w.-]+)/?")


class GgufOrigin(NamedTuple):
    """What a file's metadata say of where its weights come from; None where they say nothing."""

    file_type: str | None  # how llama.cpp calls the storage of most weights, such as Q4_1 or F16
    name: str | None  # organization and name
    license: str | None  # as the hub names it
    base_model: str | None  # hub id of the model it was made from

    def __str__(self) -> str:
        stored = f" of type {self.file_type}" if self.file_type else ""
        plain = self.file_type in (None, "F32", "F16", "BF16")
        rounded = "" if plain else ", so its weights keep the rounding of that quantization"
        return f"unpacked from a GGUF file{stored}{f' ({self.name})' if self.name else ''}{rounded}"


def read_gguf_origin(path: Path) -> GgufOrigin:
    """The origin that a file states; `read_gguf_config` has read it before."""
    from gguf import GGUFReader, LlamaFileType  # an optional dependency

    fields = GGUFReader(path).fields

    def said(name: str) -> Any:
        return fields[name].contents() if (name := f"general.{name}") in fields else None

    file_type = said("file_type")
    known = file_type in set(LlamaFileType)
    found = _HUB_URL.fullmatch(str(said("base_model.0.repo_url")))
    return GgufOrigin(
        file_type=re.sub("^(ALL|MOSTLY)_", "", LlamaFileType(file_type).name) if known else None,
        name=" ".join(part for part in (said("organization"), said("name")) if part) or None,
        license=said("license"),
        base_model=found and found[1],
    )


def read_gguf_config(path: Path, *, field: str) -> PreTrainedConfig:
    """The architecture, from the file's metadata and, for rope scaling, a tensor.

    ConfigError if the packages for GGUF are missing, or the file states what no model here can do; CheckpointError if
    the file is damaged, or of an architecture that transformers cannot read.
    """
    if not (is_gguf_available() and is_accelerate_available()):
        allowed = "a .gguf file only where the packages gguf and accelerate are installed"
        raise ConfigError(field, got=str(path), allowed=allowed, fix='pip install "layerskip-lightning[gguf]"')
    from gguf import GGUFReader

    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        obey_metadata(config, GGUFReader(path), field=field, path=str(path))
    except ConfigError:
        raise
    except Exception as error:  # the readers raise anything at damaged bytes
        raise _unreadable(path, error) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights will not be quantized
    return config


def read_gguf_tokenizer(path: Path) -> Any:
    """The tokenizer in a file's metadata, or CheckpointError where transformers cannot read it."""
    try:
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    except Exception as error:
        raise _unreadable(path, error) from error


def read_gguf_weights(
    path: Path, config: PreTrainedConfig, *, dtype: torch.dtype | None, field: str = "pretrained"
) -> PreTrainedModel:
    """The model with its weights unpacked to `dtype`, or to float32 for None.

    CheckpointError if the file is damaged, or weights are missing; ConfigError if it has some that the model has not.
    """
    from gguf import GGUFReader

    try:
        with _progress_on_terminals_only():
            model, info = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                config=config,
                dtype=dtype or torch.float32,
                attn_implementation="sdpa",
                quantization_config=GgufConfig(dequantize=True),  # otherwise the model could not be saved
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `check_complete` names them
            )
    except Exception as error:
        raise _unreadable(path, error) from error
    check_complete(str(path), info)
    check_all_used(model, GGUFReader(path), field=field, path=str(path))
    return model


@contextmanager
def _progress_on_terminals_only() -> Iterator[None]:
    """Switch off the progress bars where stderr is no terminal; transformers' switch does not reach its GGUF reader."""
    was_on, reader_bar = transformers_logging.is_progress_bar_enabled(), modeling_gguf_pytorch_utils.tqdm
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
        modeling_gguf_pytorch_utils.tqdm = transformers_logging.tqdm
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = reader_bar
        if was_on:
            transformers_logging.enable_progress_bar()


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = IS_POINTER if path.is_file() and is_pointer(path) else shortened(error)
    return CheckpointError(f"{path}: truncated, damaged, or not a GGUF file that transformers can read ({reason})")
