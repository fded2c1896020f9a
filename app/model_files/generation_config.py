"""Reads, checks and saves `generation_config.json`. Tested by tests/unit/model_files/test_open.py."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME
from transformers.utils import logging as transformers_logging

from app.checkpoints.run_record import GENERATION_CONFIG_KEY
from app.errors import CheckpointError, shortened
from app.text.text_tokens import listed_ends

if TYPE_CHECKING:
    from app.checkpoints.weights import TrainedWeights

_log = logging.getLogger(__name__)

# While this mark is set, transformers drops fields that it does not know, and older versions read config.json instead.
DERIVED = "_from_model_config"
_IDLE = re.compile(r"^- `(\w+)`: ", re.MULTILINE)  # a field in transformers' refusal to save a config


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Switch off transformers' progress bars, and its warnings of what is said or mended here."""
    was_on, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if was_on:
            transformers_logging.enable_progress_bar()


def stored_generation_config(directory: Path, config: PreTrainedConfig) -> GenerationConfig:
    """The generation config of a model directory, or the one that `config` implies where there is no such file.

    One that is damaged, contradicts itself, or names ends of text that are no token ids is a CheckpointError.
    """
    file = directory / GENERATION_CONFIG_NAME
    try:
        with quiet_transformers():
            if os.path.lexists(file):  # a link to nothing is a fault, and no absence
                read_generation_config(directory)  # transformers passes over a damaged file
                generation = GenerationConfig.from_pretrained(directory)
            else:
                file, generation = directory / CONFIG_NAME, GenerationConfig.from_model_config(config)
    except CheckpointError:
        raise
    except Exception as error:  # transformers' validation raises anything
        raise CheckpointError(f"{file}: contradicts itself ({shortened(error)})") from error
    vocab_size = config.get_text_config().vocab_size
    for end in listed_ends(generation.eos_token_id):
        if type(end) is not int or not 0 <= end < vocab_size:
            allowed = f"a token id from 0 to {vocab_size - 1}, several of them, or null"
            raise CheckpointError(f"{file}: eos_token_id: got {generation.eos_token_id!r}, allowed {allowed}")
    return generation


def trained_generation_config(trained: TrainedWeights) -> GenerationConfig:
    """The generation config of a checkpoint's model, or CheckpointError if it or the tokenizer is damaged.

    Its ends of text include the end that the run's tokenizer gave to rows, which the model continued may not know.
    """
    saved = trained.metadata.get(GENERATION_CONFIG_KEY)
    end = None if trained.tokenizer is None else trained.tokenizer.eos_token_id
    try:
        with quiet_transformers():
            if saved is None:
                generation = GenerationConfig.from_model_config(trained.config)
            else:
                generation = GenerationConfig.from_dict(dict(saved))
            ends = listed_ends(generation.eos_token_id)
            if end is None or end in ends:
                return generation
            fields = {name: value for name, value in generation.to_dict().items() if name != DERIVED}
            return GenerationConfig.from_dict(fields | {"eos_token_id": [*ends, end] if ends else end})
    except Exception as error:  # transformers' validation raises anything
        damage = f"its {GENERATION_CONFIG_KEY!r} is damaged ({shortened(error)})"
        raise CheckpointError(f"checkpoint {trained.path}: {damage}") from error


def read_generation_config(directory: Path) -> dict[str, Any]:
    """The fields of `generation_config.json`, or those that config.json implies; CheckpointError for a damaged file."""
    file = directory / GENERATION_CONFIG_NAME
    if not os.path.lexists(file):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        return GenerationConfig.from_model_config(config).to_diff_dict()  # type: ignore[no-any-return]
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: unreadable or damaged ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: damaged, not a JSON object")
    return content


def saveable(generation: GenerationConfig) -> GenerationConfig:
    """A copy that transformers agrees to save, which it refuses for instance for a temperature without do_sample.

    Fields that have no effect are dropped with a warning; a config that contradicts itself is a CheckpointError.
    """
    kept = copy.deepcopy(generation)
    try:
        kept.validate(strict=True)
    except ValueError as error:
        dropped = {name: getattr(kept, name) for name in _IDLE.findall(str(error))}
        if not dropped:
            found = f"the model's {GENERATION_CONFIG_NAME} contradicts itself, mend it there"
            raise CheckpointError(f"{found}: {shortened(error)}") from error
        for name in dropped:
            setattr(kept, name, None)
        said = ", ".join(f"{name} {value}" for name, value in dropped.items())
        _log.warning("%s: fields that have no effect are dropped: %s", GENERATION_CONFIG_NAME, said)
    return kept
