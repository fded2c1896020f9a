"""How a model is best decoded, stored with it in `generation_config.json`: a field of ours, and transformers' own.

`assistant_early_exit` and its companions make plain `model.generate` of transformers draft from the same exit. It then
takes one prompt at a time; for a batch pass it `assistant_early_exit=None`.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import AutoConfig, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from app.errors import CheckpointError, ConfigError, check_choice, check_range
from app.whole_file import write_whole
from app.words import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # loading all of transformers' models takes seconds

_log = logging.getLogger(__name__)

DefaultStrategy = Literal["self_speculative", "autoregressive"]

_FILE: str = GENERATION_CONFIG_NAME
DEFAULTS_FIELD = "layerskip"
_EARLY_EXIT, _NUM_TOKENS, _SCHEDULE = "assistant_early_exit", "num_assistant_tokens", "num_assistant_tokens_schedule"
DERIVED = "_from_model_config"  # while it is set, transformers drops fields it does not know; old ones read config.json
_IDLE = re.compile(r"^- `(\w+)`: ", re.MULTILINE)  # in what transformers says of a config that it does not save


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Under what a choice was measured: under others, something else may be fastest.

    Attributes:
        dtype: Of the weights, as torch names it.
        device_type: Of the device, as torch names it.
        threads: CPU threads, at least 1; None on another device.
        batch_size: Sequences decoded together, at least 1.
    """

    dtype: str
    device_type: str
    threads: int | None = None
    batch_size: int = 1

    def __post_init__(self) -> None:
        for name in ("dtype", "device_type"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(name, got=getattr(self, name), allowed="a name of torch's")
        for name in ("threads", "batch_size"):
            value = getattr(self, name)
            if (type(value) is not int or value < 1) and not (name == "threads" and value is None):
                raise ConfigError(name, got=value, allowed="an integer, at least 1")

    @classmethod
    def of(cls, model: PreTrainedModel, *, batch_size: int = 1) -> Conditions:
        """Those of decoding with this model here and now."""
        return cls(
            dtype=str(model.dtype).removeprefix("torch."),
            device_type=model.device.type,
            threads=torch.get_num_threads() if model.device.type == "cpu" else None,
            batch_size=batch_size,
        )

    def __str__(self) -> str:
        parts = [f"{self.dtype} on {self.device_type}"]
        if self.threads is not None:
            parts.append(counted(self.threads, "thread"))
        if self.batch_size > 1:
            parts.append(f"batches of {self.batch_size}")
        return parts[0] if len(parts) == 1 else f"{parts[0]} with {' and '.join(parts[1:])}"

    def differing(self, here: Conditions) -> str:
        """What is otherwise `here`, in words; empty if nothing is."""
        parts = [here.dtype] if here.dtype != self.dtype else []
        if here.device_type != self.device_type:
            parts.append(here.device_type)
        elif here.threads != self.threads and here.threads is not None:
            parts.append(counted(here.threads, "thread"))
        if here.batch_size != self.batch_size:
            parts.append(f"batches of {here.batch_size}")
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class DecodingDefaults:
    """What `layerskip tune` chose for a model, and what its choice rests on.

    Attributes:
        strategy: The faster one.
        exit_layer: Blocks run by a draft, 1..num_layers-1; None where nothing is drafted.
        num_draft_tokens: Drafts in a round, at least 1; None where nothing is drafted.
        head: H, a step's cost beside its blocks, in blocks; None if unknown.
        draft_head: H_d, the same of a draft; None: as `head`.
        first_extra: j, cost of several positions in a pass at all, as a share of the pass over one; None if unknown.
        extra_token: k, cost of each further position, as the same share; None if unknown.
        overhead: Of a round, in blocks; None if unknown.
        measured_speedup: Over autoregressive decoding, at least 1; None where nothing is drafted, or it was measured on
            other weights.
        conditions: Of the measurements; None in files written before they were noted.
    """

    strategy: DefaultStrategy
    exit_layer: int | None = None
    num_draft_tokens: int | None = None
    head: float | None = None
    draft_head: float | None = None
    first_extra: float | None = None
    extra_token: float | None = None
    overhead: float | None = None
    measured_speedup: float | None = None
    conditions: Conditions | None = None

    def __post_init__(self) -> None:
        check_choice("strategy", self.strategy, ("self_speculative", "autoregressive"))
        drafts = self.strategy == "self_speculative"
        for name in ("exit_layer", "num_draft_tokens"):
            value = getattr(self, name)
            if drafts != (type(value) is int and value >= 1):
                allowed = "an integer, at least 1" if drafts else "null"
                raise ConfigError(name, got=value, allowed=f"{allowed}, with strategy {self.strategy}")
        for name in ("head", "draft_head", "first_extra", "extra_token", "overhead", "measured_speedup"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
                raise ConfigError(name, got=value, allowed="a number or null")
            check_range(name, value or 0.0, low=0.0, high=sys.float_info.max)


def read_decoding_defaults(model: PreTrainedModel) -> DecodingDefaults | None:
    """The defaults stored with a model; None if there are none.

    Raises:
        ConfigError: What is stored does not fit this model, or is not what `layerskip tune` writes.
    """
    stored = getattr(model.generation_config, DEFAULTS_FIELD, None)
    if stored is None:
        return None
    fix = f"run layerskip tune again, or take {DEFAULTS_FIELD!r} out of {_FILE}"
    if not isinstance(stored, Mapping) or "strategy" not in stored:
        raise ConfigError(f"{_FILE}: {DEFAULTS_FIELD}", got=stored, allowed="an object with a strategy", fix=fix)
    try:
        defaults = DecodingDefaults(**_known(stored, DecodingDefaults))
        num_layers = model.config.get_text_config().num_hidden_layers
        if defaults.exit_layer is not None:
            check_range("exit_layer", defaults.exit_layer, low=1, high=num_layers - 1)
    except ConfigError as error:
        field = f"{_FILE}: {DEFAULTS_FIELD}.{error.field}"
        raise ConfigError(field, got=error.got, allowed=error.allowed, fix=fix) from error
    return defaults


def _known(stored: Mapping[str, Any], kind: type[DecodingDefaults | Conditions]) -> dict[str, Any]:
    """What was stored, as arguments of `kind`."""
    names = sorted(field.name for field in fields(kind))
    if unknown := sorted(map(str, stored.keys() - set(names))):
        raise ConfigError(unknown[0], got=stored[unknown[0]], allowed=f"one of {', '.join(names)}")
    known = dict(stored)
    conditions = known.get("conditions")
    if conditions is not None:
        if not isinstance(conditions, Mapping) or not {"dtype", "device_type"} <= conditions.keys():
            raise ConfigError("conditions", got=conditions, allowed="an object with dtype and device_type, or null")
        known["conditions"] = Conditions(**_known(conditions, Conditions))
    return known


def write_decoding_defaults(directory: Path, defaults: DecodingDefaults) -> Path:
    """Store the defaults in the model directory's `generation_config.json`, all of it or nothing.

    Every other field stays, but for the mark that the file was derived from config.json: it no longer is. Where
    nothing is drafted, `assistant_early_exit` and its companions are taken out.

    Args:
        directory: A Hugging Face model directory.
        defaults: To store.

    Returns:
        The file.

    Raises:
        CheckpointError: If the file is damaged or cannot be written.
    """
    content = read_generation_config(directory)
    content.pop(DERIVED, None)
    if defaults.strategy == "self_speculative":
        content[_EARLY_EXIT], content[_NUM_TOKENS] = defaults.exit_layer, defaults.num_draft_tokens
        content[_SCHEDULE] = "constant"
    elif content.pop(_EARLY_EXIT, None) is not None:
        content.pop(_NUM_TOKENS, None)
        content.pop(_SCHEDULE, None)
    content[DEFAULTS_FIELD] = asdict(defaults)
    file = directory / _FILE
    try:
        write_whole(file, json.dumps(content, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise CheckpointError(f"cannot write {file}: {error}") from error
    return file


def read_generation_config(directory: Path) -> dict[str, Any]:
    """The fields of a model directory's `generation_config.json`; those that config.json implies if there is none.

    Raises:
        CheckpointError: If it is damaged.
    """
    file = directory / _FILE
    if not file.exists():
        implied: dict[str, Any] = GenerationConfig.from_model_config(
            AutoConfig.from_pretrained(directory, trust_remote_code=False)
        ).to_diff_dict()
        return implied
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: unreadable or damaged ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: damaged, not a JSON object")
    return content


def saveable(generation: GenerationConfig) -> GenerationConfig:
    """A copy that transformers agrees to save: it refuses, for instance, a temperature without do_sample.

    Fields that it calls of no effect are dropped, with a warning; so generation stays what it was.

    Raises:
        CheckpointError: It contradicts itself in another way.
    """
    kept = copy.deepcopy(generation)
    try:
        kept.validate(strict=True)
    except ValueError as error:
        dropped = {name: getattr(kept, name) for name in _IDLE.findall(str(error))}
        if not dropped:
            reason = textwrap.shorten(str(error), 300)
            raise CheckpointError(f"the model's {_FILE} contradicts itself, mend it there: {reason}") from error
        for name in dropped:
            setattr(kept, name, None)
        said = ", ".join(f"{name} {value}" for name, value in dropped.items())
        _log.warning("%s: dropped, since they have no effect as it is: %s", _FILE, said)
    return kept


def untuned_generation_config(model: PreTrainedModel) -> dict[str, Any]:
    """The model's generation config as plain values, without what was tuned: weights that are trained want it anew."""
    stored = json.loads(model.generation_config.to_json_string(use_diff=True))
    return {
        name: value
        for name, value in stored.items()
        if name not in (DEFAULTS_FIELD, _EARLY_EXIT, _NUM_TOKENS, _SCHEDULE)
    }
