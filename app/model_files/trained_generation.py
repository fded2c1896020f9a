"""How a stored model generates: as its folder says; a trained one as what it continued, with the end it learned."""

from __future__ import annotations

import textwrap
from pathlib import Path

from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from app.checkpoints.run_record import GENERATION_CONFIG_KEY
from app.checkpoints.weights import TrainedWeights
from app.errors import CheckpointError
from app.model_files.decoding_defaults import DERIVED, read_generation_config
from app.model_files.loading import quiet_transformers
from app.text.text_tokens import listed_ends


def stored_generation_config(directory: Path, config: PreTrainedConfig) -> GenerationConfig:
    """The generation config of a model directory; that which `config` implies where there is no such file.

    Raises:
        CheckpointError: It is damaged, contradicts itself, or a text cannot end where it says.
    """
    file = directory / GENERATION_CONFIG_NAME
    implied = not file.exists()
    if not implied:
        read_generation_config(directory)  # transformers passes over a damaged one, and over where a text ends
    try:
        with quiet_transformers():  # of what `decoding_defaults.saveable` mends
            if implied:
                file, generation = directory / CONFIG_NAME, GenerationConfig.from_model_config(config)
            else:
                generation = GenerationConfig.from_pretrained(directory)
    except Exception as error:  # transformers' validation raises anything
        reason = textwrap.shorten(str(error), 300)
        raise CheckpointError(f"{file}: contradicts itself ({reason})") from error
    _check_ends(generation, vocab_size=config.get_text_config().vocab_size, file=file)
    return generation


def _check_ends(generation: GenerationConfig, *, vocab_size: int, file: Path) -> None:
    for end in listed_ends(generation.eos_token_id):
        if type(end) is not int or not 0 <= end < vocab_size:
            allowed = f"a token id from 0 to {vocab_size - 1}, several of them, or null"
            raise CheckpointError(f"{file}: eos_token_id: got {generation.eos_token_id!r}, allowed {allowed}")


def trained_generation_config(trained: TrainedWeights) -> GenerationConfig:
    """The generation config of a checkpoint's model; what it was trained to end with is among its ends of text.

    Its rows ended with the end-of-text token of the run's tokenizer, which need not be that of the model continued.

    Raises:
        CheckpointError: What the checkpoint says of generation, or its tokenizer, is damaged.
    """
    saved = trained.metadata.get(GENERATION_CONFIG_KEY)
    end = None if trained.tokenizer is None else trained.tokenizer.eos_token_id
    try:
        with quiet_transformers():  # of what `decoding_defaults.saveable` mends
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
        reason = textwrap.shorten(str(error), 300)
        raise CheckpointError(
            f"checkpoint {trained.path}: its {GENERATION_CONFIG_KEY!r} is damaged ({reason})"
        ) from error
