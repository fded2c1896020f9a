"""What `layerskip tune` chose for a model, stored in its `generation_config.json`.

The fields `assistant_early_exit` and its companions make plain `model.generate` of transformers draft from the same
exit. It then takes one prompt at a time; for a batch pass it `assistant_early_exit=None`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers.utils import GENERATION_CONFIG_NAME

from app.errors import CheckpointError, ConfigError, check_choice, check_range
from app.model_files.generation_config import DERIVED, read_generation_config
from app.whole_file import write_whole
from app.words import counted, dtype_name

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel  # loading all of transformers' models takes seconds

DEFAULTS_FIELD = "layerskip"  # of a generation config
_EARLY_EXIT, _NUM_TOKENS, _SCHEDULE = "assistant_early_exit", "num_assistant_tokens", "num_assistant_tokens_schedule"
DefaultStrategy = Literal["self_speculative", "n_gram", "autoregressive"]
TunedPolicy = Literal["fixed", "adaptive", "dynamic"]
_POLICIES: tuple[TunedPolicy, ...] = ("fixed", "adaptive", "dynamic")
SETTING_NAMES = ("exit_layer", "num_draft_tokens", "n_gram_match", "n_gram_max_drafts")
_NEEDED: dict[DefaultStrategy, tuple[str, ...]] = {
    "self_speculative": ("exit_layer", "num_draft_tokens"),
    "n_gram": ("n_gram_match",),
    "autoregressive": (),
}
_TAKEN: dict[DefaultStrategy, tuple[str, ...]] = {
    "self_speculative": SETTING_NAMES,
    "n_gram": ("n_gram_match", "n_gram_max_drafts"),
    "autoregressive": (),
}


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a measurement was made under: under other conditions something else may be fastest."""

    dtype: str  # of the weights, as torch names it
    device_type: str  # as torch names it
    threads: int | None = None  # of the CPU, at least 1; None on another device
    batch_size: int = 1  # sequences decoded together, at least 1

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
        return cls(
            dtype=dtype_name(model.dtype),
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
        """Those conditions of `here`, in words, that differ from these; empty if none does."""
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
    """What `layerskip tune` chose for a model, and the costs that it measured; None stands for an unknown cost."""

    strategy: DefaultStrategy
    exit_layer: int | None = None  # blocks that a draft runs, 1..num_layers-1; None where no exit drafts
    num_draft_tokens: int | None = None  # in a round, at least 1; None where no exit drafts
    # Tokens that must have occurred before, at least 1; None where n-grams do not draft.
    n_gram_match: int | None = None
    n_gram_max_drafts: int | None = None  # most tokens of a draft of n-grams, at least 1; None for the usual number
    draft_policy: TunedPolicy = "fixed"  # how many of `num_draft_tokens` are drafted, and from which exit
    draft_exits: tuple[int, ...] = ()  # exits that policy dynamic chooses among beside `exit_layer`
    # Number of token ids that an exit's drafts are chosen from: the first ones of the model's draft vocabulary, or V
    # for all token ids. None takes the draft vocabulary as it is, if there is one.
    draft_vocabulary_size: int | None = None
    head: float | None = None  # H, the cost of a step beside its blocks, in blocks
    draft_head: float | None = None  # H_d, the same for a draft; None means as `head`
    first_extra: float | None = None  # j, the cost of a second position in a pass, as a share of a pass over one
    extra_token: float | None = None  # k, the cost of each further position, as the same share
    overhead: float | None = None  # of a round beside its passes, in blocks
    measured_speedup: float | None = None  # over autoregressive decoding, at least 1; None for other weights
    conditions: Conditions | None = None  # None in files of versions that did not store them

    def __post_init__(self) -> None:
        check_choice("strategy", self.strategy, _NEEDED)
        for name in SETTING_NAMES:
            value = getattr(self, name)
            is_needed = name in _NEEDED[self.strategy]
            may_be_given = name in _TAKEN[self.strategy]
            is_number = type(value) is int and value >= 1
            if not (may_be_given if is_number else value is None and not is_needed):
                allowed = ["an integer, at least 1"] * may_be_given + ["null"] * (not is_needed)
                raise ConfigError(name, got=value, allowed=f"{' or '.join(allowed)}, with strategy {self.strategy}")
        check_choice("draft_policy", self.draft_policy, _POLICIES if self.strategy == "self_speculative" else ["fixed"])
        others = self.draft_exits
        if not isinstance(others, tuple):
            raise ConfigError("draft_exits", got=others, allowed="a list of exits")
        size, drafts = self.draft_vocabulary_size, self.strategy == "self_speculative"
        is_list = all(type(each) is int and each >= 1 for each in others)
        if not is_list or (others and not drafts) or (self.draft_policy == "dynamic" and not others):
            said = f"a list of exits, with {self.draft_policy}" if drafts else f"[], with strategy {self.strategy}"
            raise ConfigError("draft_exits", got=list(others), allowed=said)
        if size is not None and not (drafts and type(size) is int and size >= 1):
            said = "an integer, at least 1, or null" if drafts else f"null, with strategy {self.strategy}"
            raise ConfigError("draft_vocabulary_size", got=size, allowed=said)
        for name in ("head", "draft_head", "first_extra", "extra_token", "overhead", "measured_speedup"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
                raise ConfigError(name, got=value, allowed="a number or null")
            check_range(name, value or 0.0, low=0.0, high=sys.float_info.max)

    @property
    def settings(self) -> dict[str, Any]:
        """What the strategy drafts with, by name."""
        return drafting_settings(self)


def drafting_settings(given: Any) -> dict[str, Any]:
    """What is not None of these defaults, or of a request's settings, by name; a policy only where it is not fixed."""
    found = {name: value for name in SETTING_NAMES if (value := getattr(given, name)) is not None}
    if given.draft_policy not in (None, "fixed"):
        found["draft_policy"] = given.draft_policy
    if given.draft_policy == "dynamic":
        found["draft_exits"] = given.draft_exits
    return found


def read_decoding_defaults(model: PreTrainedModel) -> DecodingDefaults | None:
    """The defaults stored with a model, or None; ConfigError if they do not fit the model or are malformed."""
    stored = getattr(model.generation_config, DEFAULTS_FIELD, None)
    return None if stored is None else parse_decoding_defaults(stored, model.config)


def parse_decoding_defaults(stored: object, config: PreTrainedConfig) -> DecodingDefaults:
    """The defaults in a file's JSON value, or ConfigError if they do not fit a model of `config`."""
    where = f"{GENERATION_CONFIG_NAME}: {DEFAULTS_FIELD}"
    fix = f"run layerskip tune again, or take {DEFAULTS_FIELD!r} out of {GENERATION_CONFIG_NAME}"
    if not isinstance(stored, Mapping) or "strategy" not in stored:
        raise ConfigError(where, got=stored, allowed="an object with a strategy", fix=fix)
    try:
        defaults = DecodingDefaults(**_arguments(stored, DecodingDefaults))
        text = config.get_text_config()
        if defaults.exit_layer is not None:
            last = text.num_hidden_layers - 1
            if last == 0:
                raise ConfigError("strategy", got=defaults.strategy, allowed="autoregressive, for a model of one block")
            check_range("exit_layer", defaults.exit_layer, low=1, high=last)
            for exit_layer in defaults.draft_exits:
                check_range("draft_exits", exit_layer, low=1, high=last)
        check_range("draft_vocabulary_size", defaults.draft_vocabulary_size or 1, low=1, high=text.vocab_size)
    except ConfigError as error:
        raise ConfigError(f"{where}.{error.field}", got=error.got, allowed=error.allowed, fix=fix) from error
    return defaults


def _arguments(stored: Mapping[str, Any], kind: type[DecodingDefaults | Conditions]) -> dict[str, Any]:
    names = sorted(field.name for field in fields(kind))
    if unknown := sorted(map(str, stored.keys() - set(names))):
        raise ConfigError(unknown[0], got=stored[unknown[0]], allowed=f"one of {', '.join(names)}")
    if isinstance(exits := stored.get("draft_exits"), list):
        stored = {**stored, "draft_exits": tuple(exits)}
    conditions = stored.get("conditions")
    if conditions is None:
        return dict(stored)
    if not isinstance(conditions, Mapping) or not {"dtype", "device_type"} <= conditions.keys():
        raise ConfigError("conditions", got=conditions, allowed="an object with dtype and device_type, or null")
    return {**stored, "conditions": Conditions(**_arguments(conditions, Conditions))}


def write_decoding_defaults(directory: Path, defaults: DecodingDefaults) -> Path:
    """Store the defaults in a model directory's `generation_config.json`, all of it or nothing.

    Other fields stay, except the mark that the file was derived from config.json. Where nothing is drafted,
    `assistant_early_exit` and its companions are taken out. The path of the file is returned; a file that is damaged
    or cannot be written is a CheckpointError.
    """
    content = read_generation_config(directory)
    content.pop(DERIVED, None)
    if defaults.strategy == "self_speculative":
        schedule = "constant" if defaults.draft_policy == "fixed" else "heuristic_transient"
        content |= {_EARLY_EXIT: defaults.exit_layer, _NUM_TOKENS: defaults.num_draft_tokens, _SCHEDULE: schedule}
    elif content.pop(_EARLY_EXIT, None) is not None:
        content.pop(_NUM_TOKENS, None)
        content.pop(_SCHEDULE, None)
    content[DEFAULTS_FIELD] = asdict(defaults)
    file: Path = directory / GENERATION_CONFIG_NAME
    try:
        write_whole(file, json.dumps(content, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise CheckpointError(f"cannot write {file}: {error}") from error
    return file


def untuned_generation_config(model: PreTrainedModel) -> dict[str, Any]:
    """The model's generation config as plain values, without what `layerskip tune` chose for its present weights."""
    stored = json.loads(model.generation_config.to_json_string(use_diff=True))
    tuned = (DEFAULTS_FIELD, _EARLY_EXIT, _NUM_TOKENS, _SCHEDULE)
    return {name: value for name, value in stored.items() if name not in tuned}
