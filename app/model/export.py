"""Models out: a Hugging Face directory that plain transformers loads."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from app.errors import CheckpointError, ConfigError


def check_output_dir(output_dir: str) -> Path:
    """The directory to write to, absolute.

    Raises:
        ConfigError: If it holds anything already, or is a file.
    """
    directory = Path(output_dir).resolve()
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        fix = "choose another, or remove this one first"
        raise ConfigError("output_dir", got=output_dir, allowed="a directory that is new or empty", fix=fix)
    return directory


def write_pretrained(model: PreTrainedModel, tokenizer: Any, directory: Path) -> None:
    """Write configuration, generation configuration, safetensors and tokenizer: all of them or, failing that, nothing.

    Args:
        model: If its generation config has no end of text, the tokenizer's is written.
        tokenizer: The model's.
        directory: New or empty.

    Raises:
        CheckpointError: If it cannot be written, for instance because the disk is full.
    """
    generation = copy.deepcopy(model.generation_config)
    if generation.eos_token_id is None:
        generation.eos_token_id = tokenizer.eos_token_id
    partial = directory.with_name(f".{directory.name}.partial")  # a rename needs the same disk
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        partial.mkdir(parents=True)
        model.save_pretrained(partial)
        generation.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        for weights in partial.glob("*.safetensors"):  # written for their owner's eyes only
            weights.chmod((partial / CONFIG_NAME).stat().st_mode)
        partial.replace(directory)
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: a generation config that contradicts itself
        raise CheckpointError(f"cannot write {directory}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
