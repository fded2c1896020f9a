"""Which settings a resumed run may change, and what follows from those that it changes."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from lightning.pytorch import Trainer
from torch.optim.lr_scheduler import LambdaLR

from app.checkpoints.run_record import RUN_CONFIG_KEY
from app.errors import CheckpointError, ConfigError

_log = logging.getLogger(__name__)

# What a run is, and its user may insist on changing. The data's order and tokenizer are the datamodule's to compare,
# the shape of the model the module's.
_SAME = (
    "model.optimizer",
    "model.lr_schedule",
    "model.warmup_steps",
    "model.final_lr_ratio",
    "model.lr_scheduler",
    "layer_dropout",
    "early_exit",
    "trainer.precision",
    "trainer.gradient_clip_val",
    "trainer.gradient_clip_algorithm",
)
_SEED = "seed_everything"
_TOKENIZER, _VOCAB_SIZE = "data.init_args.tokenizer", "data.init_args.vocab_size"
_OPTIMIZER, _SCHEDULER = "model.optimizer", "model.lr_scheduler"
_SCHEDULER_CLASS = f"{_SCHEDULER}.class_path"
_DEFAULT_OPTIMIZER, _ITS_CLASS = "app.training.module._default_optimizer", "torch.optim.AdamW"
_WITH_STATES = ("amsgrad", "centered", "momentum")  # an optimizer's settings that need states of their own
_NEW_RUN = "start a new run from the weights (--model.pretrained CHECKPOINT)"
_LENGTH = "trainer.max_steps"
_OF_LENGTH = (  # settings that make a run's course a function of its length, and their values that do not
    ("model.lr_schedule", ("constant",)),
    ("layer_dropout.time_scale", ("constant",)),
    ("early_exit.curriculum", ("rotational", "fixed", "none")),
)


@dataclass
class GivenConfig:
    """The config of a run that may go on from a checkpoint. The command line has one, a script has none.

    Args:
        settings: As nested plain values.
        allow_changes: Settings that may differ: names, or groups of them.
        text: The settings as YAML, which this run's checkpoints keep.
    """

    settings: Mapping[str, Any]
    allow_changes: Sequence[str] = ()
    text: str = ""
    _text: object = field(default=None, init=False)  # the config of the run that was saved, as its checkpoint has it
    _saved: Mapping[str, Any] | None = field(default=None, init=False)
    _compared: bool = field(default=False, init=False)

    def read(self, checkpoint: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The config of the run that a checkpoint is of; None where none was written.

        Raises:
            CheckpointError: It is not one.
        """
        if RUN_CONFIG_KEY not in checkpoint:
            self._saved = None
        elif self._saved is None or self._text != checkpoint[RUN_CONFIG_KEY]:
            self._text = checkpoint[RUN_CONFIG_KEY]
            self._saved, self._compared = _run_config(self._text), False
        return self._saved

    def compare(self, checkpoint: Mapping[str, Any], *, fit: bool) -> int | None:
        """Refuse to go on with another run; the config of one run is compared once.

        Args:
            checkpoint: Its small values will do.
            fit: Whether it goes on with training; otherwise it only takes the weights and the data.

        Returns:
            Micro-batches of an optimizer step of the run that was saved; None where no config tells.

        Raises:
            ConfigError, CheckpointError: Naming what differs, and how to insist.
        """
        saved = self.read(checkpoint)
        if saved is None:
            self.check_names()
            return None
        if not self._compared:
            _refuse_another_tokenizer(saved, self.settings)
            if fit:
                refuse_changes(saved, self.settings, allowed=self.allow_changes)
                _warn_of_length(saved, self.settings, step=checkpoint.get("global_step"))
            self._compared = True
        return int(saved["trainer"]["accumulate_grad_batches"])

    def check_names(self) -> None:
        """Refuse names in `allow_changes` of settings that no user can insist on, with ConfigError."""
        check_names(self.allow_changes, self.settings)


def changes_optimizer(allow_changes: Sequence[str]) -> bool:
    """Whether a user insists on settings of the optimizer or its schedule."""
    return any(name.split(".")[0] == "model" for name in allow_changes)


def _run_config(text: object) -> Mapping[str, Any]:
    try:
        config = yaml.safe_load(text) if isinstance(text, str) else text
    except Exception as error:  # PyYAML's constructors raise anything at values that are not what their tags say
        reason = textwrap.shorten(str(error), 200)
        raise CheckpointError(f"the checkpoint's {RUN_CONFIG_KEY!r} is damaged: not plain YAML ({reason})") from error
    match config:
        case {"trainer": {"accumulate_grad_batches": int(number)}} if number > 0:
            return config  # type: ignore[return-value]
    got = textwrap.shorten(repr(text), 100)
    raise CheckpointError(f"the checkpoint's {RUN_CONFIG_KEY!r} is damaged: got {got}, allowed a run's config as YAML")


def check_names(names: Sequence[str], *configs: Mapping[str, Any]) -> None:
    """Refuse names of settings that no user can insist on.

    Args:
        names: Given as --allow_changes.
        configs: Of the runs, whose settings a name below a group has to be among.

    Raises:
        ConfigError: Naming the first, and what is allowed.
    """
    known = [name for config in configs for name, _ in _flat(config)]
    for name in names:
        below = any(_within(name, group) for group in _SAME) and any(_within(key, name) for key in known)
        if not below and not any(_within(group, name) for group in _SAME):
            fix = "all others may differ anyway, or may not at all"
            raise ConfigError("allow_changes", got=name, allowed=f"{' | '.join(_SAME)}, or parts of them", fix=fix)


def refuse_changes(saved: Mapping[str, Any], given: Mapping[str, Any], *, allowed: Sequence[str]) -> None:
    """Raise where settings differ that make a run what it is and may not.

    Raises:
        ConfigError: A setting differs that must not, or a name of `allowed` is not one that may.
        CheckpointError: Settings differ that may, if their user insists.
    """
    check_names(allowed, saved, given)
    before, now = dict(_flat(saved)), dict(_flat(given))
    if before.get(_SEED) != now.get(_SEED):
        fix = f"batches and dropout masks are drawn from it: restore it, or {_NEW_RUN}"
        raise ConfigError(_SEED, got=now.get(_SEED), allowed=f"{before.get(_SEED)!r}, as in the checkpoint", fix=fix)
    _refuse_other_states(before, now)
    _refuse_another_scheduler(before, now)
    differing = [
        f"{name} {before.get(name)!r} (given: {now.get(name)!r})"
        for name in sorted(before.keys() | now.keys())
        if any(_within(name, group) for group in _SAME)
        and not any(_within(name, group) for group in allowed)
        and before.get(name) != now.get(name)
    ]
    if differing:
        names = ", ".join(dict.fromkeys(name.split(" ")[0] for name in differing))
        raise CheckpointError(
            f"the checkpoint is of a run with other settings: {', '.join(differing)}. Resume it with its own, or insist"
            f" with --allow_changes '[{names}]'"
        )


def _refuse_other_states(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """An optimizer's states are of no use to one of another class, and no others are in the checkpoint."""
    saved, given = _optimizer(before), _optimizer(now)
    if saved != given:
        fix = f"its states are of no use to another: restore it, or {_NEW_RUN}"
        raise ConfigError(_OPTIMIZER, got=given, allowed=f"{saved!r}, as in the checkpoint", fix=fix)
    for name in (f"{_OPTIMIZER}.init_args.{setting}" for setting in _WITH_STATES):
        if now.get(name) and not before.get(name):
            fix = f"the states that it needs are not in there: restore it, or {_NEW_RUN}"
            raise ConfigError(name, got=now[name], allowed=f"{before.get(name)!r}, as in the checkpoint", fix=fix)


def _refuse_another_scheduler(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """The state of a scheduler class goes on as it was saved, with the settings and rates that it was made from."""
    classes = [str(flat.get(_SCHEDULER_CLASS)) for flat in (before, now)]
    if classes == ["None", "None"]:
        return
    fix = f"the scheduler's state depends on it: restore it, or {_NEW_RUN}"
    if classes[0] != classes[1]:
        raise ConfigError(_SCHEDULER, got=classes[1], allowed=f"{classes[0]}, as in the checkpoint", fix=fix)
    for name in sorted(before.keys() | now.keys()):
        if (_within(name, _SCHEDULER) or _within(name, _OPTIMIZER)) and before.get(name) != now.get(name):
            allowed = f"{before.get(name)!r}, as in the checkpoint"
            raise ConfigError(name, got=now.get(name), allowed=allowed, fix=fix)


def _optimizer(flat: Mapping[str, Any]) -> str:
    """The path of its class."""
    path = str(flat.get(f"{_OPTIMIZER}.class_path") or flat.get(_OPTIMIZER))
    return _ITS_CLASS if path == _DEFAULT_OPTIMIZER else path


def _refuse_another_tokenizer(saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """One that is trained to another size is another; all else that it depends on, the datamodule compares."""
    before, now = dict(_flat(saved)), dict(_flat(given))
    sizes = before.get(_VOCAB_SIZE), now.get(_VOCAB_SIZE)
    trained = before.get(_TOKENIZER) is now.get(_TOKENIZER) is None
    if trained and None not in sizes and sizes[0] != sizes[1]:
        fix = "the model knows the tokenizer that was trained to this size, and no other: restore it"
        raise ConfigError(_VOCAB_SIZE, got=sizes[1], allowed=f"{sizes[0]}, as in the checkpoint", fix=fix)


def _warn_of_length(saved: Mapping[str, Any], given: Mapping[str, Any], *, step: object) -> None:
    before, now = dict(_flat(saved)), dict(_flat(given))
    length = now.get(_LENGTH)
    if length is not None and isinstance(step, int) and 0 <= length <= step:
        _log.warning("%s %s: the checkpoint is of step %d, nothing is left to train", _LENGTH, length, step)
    idle = {"model.lr_schedule"} if _SCHEDULER_CLASS in now else set()  # of a class the settings say how long it is
    stretched = [name for name, values in _OF_LENGTH if name not in idle and now.get(name) not in values]
    if stretched and before.get(_LENGTH) != length:  # a longer run is a thing to want
        _log.warning(
            "%s %s (given: %s): %s stretched with it, so that this run is no longer the one it would have been",
            *(_LENGTH, before.get(_LENGTH), length),
            ", ".join(stretched) + (" is" if len(stretched) == 1 else " are"),
        )


def take_optimizer_settings(trainer: Trainer) -> None:
    """Put the config's optimizer settings in the place of those that came with the checkpoint.

    Without this a learning rate that a user lowers for the rest of a run would be ignored without a word.
    """
    if not all(isinstance(entry.scheduler, LambdaLR) for entry in trainer.lr_scheduler_configs):
        return  # nothing may differ under a scheduler class
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            given = {key: value for key, value in optimizer.defaults.items() if key in group}
            if all(parameter.dim() <= 1 for parameter in group["params"]):  # whatever the setting for matrices is
                given.pop("weight_decay", None)
            group.update(given, initial_lr=given["lr"])
    for entry in trainer.lr_scheduler_configs:
        scheduler = entry.scheduler
        assert isinstance(scheduler, LambdaLR)
        groups = scheduler.optimizer.param_groups
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        for group, factor in zip(groups, scheduler.lr_lambdas, strict=True):
            group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _within(name: str, group: str) -> bool:
    return name == group or name.startswith(f"{group}.")
