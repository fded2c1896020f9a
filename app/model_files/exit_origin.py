"""The file beside an exported exit that tells whose blocks it is.

Tested by tests/unit/model_files/test_exit_origin.py.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from app.errors import CheckpointError, ConfigError, shortened
from app.model.weights_hash import weights_hash

EXIT_ORIGIN_FILE = "exit_of.json"
_LAYER, _HASH = "exit_layer", "weights_hash"


def exit_origin_file(state: Mapping[str, Tensor], *, exit_layer: int) -> bytes:
    """The content of the file for the first `exit_layer` blocks of a model with these weights."""
    return json.dumps({_LAYER: exit_layer, _HASH: weights_hash(state, exit_layer=exit_layer)}).encode()


def check_exit_origin(path: str, target: PreTrainedModel, *, field: str) -> None:
    """Raise ConfigError for a draft model that was exported as the first blocks of another model than `target`.

    Any other model passes. In float16 nothing is compared, since its values need not be those that were hashed.
    CheckpointError if the file beside the draft model is damaged.
    """
    file = Path(path) / EXIT_ORIGIN_FILE
    if not os.path.lexists(file) or target.dtype == torch.float16:
        return
    try:
        told = json.loads(file.read_bytes())
        exit_layer, expected = int(told[_LAYER]), str(told[_HASH])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{file}: damaged ({shortened(error)}); export the exit again") from error
    fits = 1 <= exit_layer <= target.config.get_text_config().num_hidden_layers
    if not fits or weights_hash(target.state_dict(), exit_layer=exit_layer) != expected:
        fix = f"this one is of the first {exit_layer} blocks of another: layerskip export --exit_layer makes one"
        raise ConfigError(field, got=path, allowed="an exit of the model that it drafts for", fix=fix)
