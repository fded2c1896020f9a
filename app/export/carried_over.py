"""Takes over decoding defaults that `layerskip tune` stored elsewhere. Tested by tests/contract/test_export.py."""

import json
import logging
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from app.errors import ConfigError
from app.export.directory import Weights
from app.model_files.decoding_defaults import (
    DEFAULTS_FIELD,
    DecodingDefaults,
    parse_decoding_defaults,
    read_decoding_defaults,
)
from app.model_files.draft_vocabulary import DRAFT_VOCABULARY_FILE, read_draft_vocabulary
from app.model_files.generation_config import read_generation_config
from app.text.text_tokens import end_token_ids

_log = logging.getLogger(__name__)

_TELLING_ROWS = 8
_ALLOWED = "a tuned model directory, a generation_config.json, or the output of layerskip tune --json"


def chosen_defaults(
    model: PreTrainedModel, weights: Weights, *, given: str | None, replaced: Path
) -> DecodingDefaults | None:
    """Find what `layerskip tune` chose for a model: as given, else as the model has it, else as the directory had.

    Args:
        model: The model that is exported, which may be on the meta device.
        weights: Its weights. What was measured on other weights is left out.
        given: The user's setting `generation_defaults`, a directory or file; ConfigError if it does not fit the model.
        replaced: The directory that is written, which may hold an earlier export.
    """
    if given is not None:
        if (defaults := _stored_defaults(model, Path(given), field="generation_defaults")) is None:
            fix = "nothing of the kind is in it"
            raise ConfigError("generation_defaults", got=given, allowed="what layerskip tune stored", fix=fix)
        if not Path(given).is_dir() or _holds(Path(given), weights):
            return defaults
        _log.warning("%s holds other weights: what layerskip tune chose is taken, what it measured is not", given)
        return _unmeasured(defaults)
    if (own := read_decoding_defaults(model)) is not None or not replaced.exists():
        return own
    try:
        kept = _stored_defaults(model, replaced, field="output_dir")
    except ConfigError as error:
        _log.warning("what layerskip tune stored in %s does not fit this model and is not kept: %s", replaced, error)
        return None
    if kept is not None and not _holds(replaced, weights):
        was = "what layerskip tune stored in %s was for other weights and is not kept: %s"
        _log.warning(was, replaced, named(kept))
        return None
    if kept is not None:
        _log.info("kept from the directory that was there: %s", named(kept))
    return kept


def chosen_vocabulary(
    model: PreTrainedModel, tokenizer: Any, weights: Weights, *, given: str | None, source: str | None, replaced: Path
) -> list[int] | None:
    """Find the draft vocabulary for a model: as given, else beside the model, else in the directory that is written.

    Other arguments are those of `chosen_defaults`.

    Args:
        given: The user's setting `draft_vocabulary`: a file; DataError if it is damaged, or not for a model like this.
        source: Where the model comes from, if its draft vocabulary may stand there.
    """
    file = Path(given or Path(source or replaced) / DRAFT_VOCABULARY_FILE)
    if given is None and (source is None or not file.is_file()):
        if not (file := replaced / DRAFT_VOCABULARY_FILE).is_file():
            return None
        if not _holds(replaced, weights):
            _log.warning("%s was made for other weights and is not kept: layerskip vocabulary makes it anew", file)
            return None
        _log.info("kept from the directory that was there: %s", DRAFT_VOCABULARY_FILE)
    ends = end_token_ids(model.generation_config, tokenizer) if tokenizer is not None else ()
    return read_draft_vocabulary(file, vocab_size=model.config.get_text_config().vocab_size, ends=ends)


def fitting_vocabulary(
    defaults: DecodingDefaults | None, token_ids: Sequence[int] | None, *, vocab_size: int
) -> DecodingDefaults | None:
    """Return the defaults, without what was measured with more ids than the draft vocabulary has."""
    size = None if defaults is None else defaults.draft_vocabulary_size
    if defaults is None or size is None or size == vocab_size or size <= len(token_ids or ()):
        return defaults
    had = "no draft vocabulary" if token_ids is None else f"a draft vocabulary of {len(token_ids)} ids"
    _log.warning("layerskip tune chose drafts from %d token ids, but there is %s: measure again", size, had)
    return _unmeasured(defaults)


def _unmeasured(defaults: DecodingDefaults) -> DecodingDefaults:
    chosen: dict[str, Any] = defaults.settings | {"draft_exits": defaults.draft_exits}  # with whatever policy
    return DecodingDefaults(strategy=defaults.strategy, **chosen)


def named(defaults: DecodingDefaults) -> str:
    """Return the defaults in a few words."""
    if defaults.strategy == "autoregressive":
        return "autoregressive, no setting being faster"
    return ", ".join(f"{name} {value}" for name, value in defaults.settings.items())


def _stored_defaults(model: PreTrainedModel, path: Path, *, field: str) -> DecodingDefaults | None:
    if (stored := _stored(path, field=field)) is None:
        return None
    try:
        return parse_decoding_defaults(stored, model.config)
    except ConfigError as error:
        allowed = "what layerskip tune stored for a model like this"
        raise ConfigError(field, got=str(path), allowed=allowed, fix=str(error)) from error


def _holds(directory: Path, weights: Weights) -> bool:
    """Tell whether a model directory holds these weights, in any dtype, judged by the first rows of each.

    A single step of training changes those rows, and what was measured on a model is true only of its weights.
    """
    files = sorted(directory.glob("*.safetensors"))
    try:
        return bool(files) and all(_are_of(file, weights) for file in files)
    except (OSError, SafetensorError):  # it holds no weights that can be read
        return False


def _are_of(file: Path, weights: Weights) -> bool:
    with safe_open(file, framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118  # not a mapping
            theirs = stored.get_slice(name)
            if name not in weights.shapes or list(weights.shapes[name][0]) != theirs.get_shape():
                return False
            first, own = theirs[:_TELLING_ROWS], weights.read(name)[:_TELLING_ROWS].cpu()
            if not (torch.equal(first, own.to(first.dtype)) or torch.equal(first.to(own.dtype), own)):
                return False
    return True


def _stored(path: Path, *, field: str) -> Any:
    if path.is_dir():
        return read_generation_config(path).get(DEFAULTS_FIELD) if any(path.iterdir()) else None
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(field, got=str(path), allowed=_ALLOWED, fix=str(error)) from error
    if not isinstance(content, dict):
        raise ConfigError(field, got=str(path), allowed=_ALLOWED)
    if DEFAULTS_FIELD in content or "strategy" not in content:
        return content.get(DEFAULTS_FIELD)
    known = {entry.name for entry in fields(DecodingDefaults)}
    return {name: value for name, value in content.items() if name in known}
