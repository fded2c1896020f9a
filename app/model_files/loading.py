"""A model filled from weights on disk: built without memory or initial values, then loaded weight by weight."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME
from transformers.utils import logging as transformers_logging

from app.errors import CheckpointError, ConfigError, UserError
from app.model.config_check import build_without_memory, refused_as_config
from app.model_files.weight_files import StoredWeights

_log = logging.getLogger(__name__)


def fill_model(
    config: PreTrainedConfig,
    stored: StoredWeights,
    *,
    dtype: torch.dtype | None,
    own: bool,
    field: str,
    generation_config: GenerationConfig | None = None,
) -> PreTrainedModel:
    """The causal LM of `config` with these weights.

    Args:
        config: Architecture.
        stored: Its weights; names that older versions of transformers used are known, too.
        dtype: To load them in; None for that of the first one.
        own: Whether every weight shall have memory of its own, or may be a map of its file.
        field: The setting that the model comes from, for error messages.
        generation_config: None derives it from `config`.

    Raises:
        ConfigError: If transformers cannot build such a model.
        CheckpointError: If weights are damaged, missing, of another shape, no plain numbers, or have no place.
    """
    tables: set[str] = set()
    if not stored.plain:  # a model of tables beside its weights is rare, and it takes time to build one
        built = build_without_memory(config, dtype=torch.float32).state_dict()
        tables = {name.rpartition(".")[2] for name, tensor in built.items() if not tensor.is_floating_point()}
    try:
        with quiet_transformers():
            model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
                None,
                config=config,
                state_dict=stored.state_dict(dtype=dtype, own=own, tables=tables),
                dtype=dtype or stored.dtype,
                attn_implementation="sdpa",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `check_complete` names them
                generation_config=generation_config,
            )
    except UserError:
        raise
    except (OSError, RuntimeError) as error:
        reason = textwrap.shorten(str(error), 300)
        raise CheckpointError(f"{stored.path}: the weights are damaged ({reason})") from error
    except Exception as error:  # constructors of any architecture raise anything
        reason = textwrap.shorten(_told(error, config), 300)
        raise ConfigError(field, got=stored.path, allowed="a model that can be built", fix=reason) from error
    check_complete(stored.path, info)
    return model


def _told(error: Exception, config: PreTrainedConfig) -> str:
    """What a constructor raised, as the fault of a setting in config.json."""
    try:
        with refused_as_config(config):
            raise error
    except ConfigError as told:
        return f"{CONFIG_NAME}: {told}"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Switch its progress bars off, and its warnings of what we say ourselves."""
    was_on, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if was_on:
            transformers_logging.enable_progress_bar()


def check_complete(path: str, info: dict[str, Any]) -> None:
    """Raise CheckpointError unless all weights found their place: transformers draws the others at random."""
    missing, surplus = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if misfits := sorted(info["mismatched_keys"]):
        name, stored, wanted = misfits[0]
        first = f"the first is {name}: it has shape {[*stored]}, the configuration says {[*wanted]}"
        raise CheckpointError(f"{path}: {len(misfits)} weights do not fit, {first}")
    if missing:
        raise CheckpointError(f"{path}: {len(missing)} weights of the model are missing, the first is {missing[0]}")
    if in_blocks := [name for name in surplus if ".layers." in name]:
        raise CheckpointError(
            f"{path}: {len(in_blocks)} weights of blocks have no place in a model of its configuration, "
            f"the first is {in_blocks[0]}"
        )
    if surplus:
        _log.warning("%s: %d weights have no place in the model and are left out: %s", path, len(surplus), surplus)
