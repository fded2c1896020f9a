"""How a trained model generates: as the model that it continued said, and a text ends where it was trained to end."""

from __future__ import annotations

import textwrap

from transformers import GenerationConfig

from app.errors import CheckpointError
from app.model.decoding_defaults import DERIVED
from app.model.loading import quiet_transformers
from app.model.run_record import GENERATION_CONFIG_KEY
from app.model.trained_weights import TrainedWeights


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
            known = generation.eos_token_id
            ends = list(known) if isinstance(known, list) else [] if known is None else [known]
            if end is None or end in ends:
                return generation
            fields = {name: value for name, value in generation.to_dict().items() if name != DERIVED}
            return GenerationConfig.from_dict(fields | {"eos_token_id": [*ends, end] if ends else end})
    except Exception as error:  # transformers' validation raises anything
        reason = textwrap.shorten(str(error), 300)
        raise CheckpointError(
            f"checkpoint {trained.path}: its {GENERATION_CONFIG_KEY!r} is damaged ({reason})"
        ) from error
