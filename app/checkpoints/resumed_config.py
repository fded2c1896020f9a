"""Which settings a resumed run may change, and what follows. Tested by tests/contract/test_resume.py."""

import logging
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from lightning.pytorch import Trainer
from torch.optim.lr_scheduler import LambdaLR

from app.checkpoints.run_record import RUN_CONFIG_KEY
from app.config_tree import walk
from app.errors import CheckpointError, ConfigError

_log = logging.getLogger(__name__)

# The settings that make a run what it is, and that its user may insist on changing. The datamodule compares the order
# of the data and the tokenizer, and `may_resume` the shape of the model.
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
_WITH_STATES = ("amsgrad", "centered", "momentum")  # settings of an optimizer that need states of their own
_NEW_RUN = "start a new run from the weights (--model.pretrained CHECKPOINT)"
_LENGTH = "trainer.max_steps"
_STRETCHING = (  # settings that stretch with the length of the run, and their values that do not
    ("model.lr_schedule", ("constant",)),
    ("layer_dropout.time_scale", ("constant",)),
    ("early_exit.curriculum", ("rotational", "fixed", "none")),
)

Config = Mapping[str, Any]  # nested plain values


@dataclass
class GivenConfig:
    """The config of a run that may resume. The command line has one, a script has none."""

    settings: Config
    allow_changes: Sequence[str] = ()  # names of settings that may differ, or of groups of them
    text: str = ""  # the settings as YAML, which the checkpoints of this run keep
    _compared_with: object = field(default=None, init=False)

    def compare(self, checkpoint: Mapping[str, Any], *, fit: bool) -> int | None:
        """Refuse to resume another run. The config of the same run is compared only once.

        With `fit` False only the weights and the data are taken. ConfigError and CheckpointError name what differs, and
        how to insist. Returns the saved run's micro-batches of an optimizer step; None if the checkpoint has no config.
        """
        saved = saved_config(checkpoint)
        if saved is None:
            check_names(self.allow_changes, self.settings)
            return None
        if self._compared_with != checkpoint[RUN_CONFIG_KEY]:
            _refuse_another_tokenizer(_flat(saved), _flat(self.settings))
            if fit:
                refuse_changes(saved, self.settings, allowed=self.allow_changes)
                _warn_of_length(_flat(saved), _flat(self.settings), step=checkpoint.get("global_step"))
            self._compared_with = checkpoint[RUN_CONFIG_KEY]
        return int(saved["trainer"]["accumulate_grad_batches"])


def saved_config(checkpoint: Mapping[str, Any]) -> Config | None:
    """The config of the run that wrote a checkpoint, if there is one. Raises CheckpointError if it is damaged."""
    if RUN_CONFIG_KEY not in checkpoint:
        return None
    text = checkpoint[RUN_CONFIG_KEY]
    try:
        config = yaml.safe_load(text) if isinstance(text, str) else text
    except Exception as error:  # PyYAML's constructors raise anything at values that do not fit their tags
        reason = textwrap.shorten(str(error), 200)
        raise CheckpointError(f"the checkpoint's {RUN_CONFIG_KEY!r} is damaged: not plain YAML ({reason})") from error
    match config:
        case {"trainer": {"accumulate_grad_batches": int(micro_batches)}} if micro_batches > 0:
            return dict(config)
    got = textwrap.shorten(repr(text), 100)
    raise CheckpointError(f"the checkpoint's {RUN_CONFIG_KEY!r} is damaged: got {got}, allowed a run's config as YAML")


def changes_optimizer(allow_changes: Sequence[str]) -> bool:
    """Whether the user insists on settings of the optimizer or its schedule."""
    return any(name.split(".")[0] == "model" for name in allow_changes)


def check_names(names: Sequence[str], *configs: Config) -> None:
    """Raise ConfigError unless each of --allow_changes is a setting that a user may insist on, or a part of one."""
    known = [name for config in configs for name in _flat(config)]
    for name in names:
        below = any(_is_within(name, group) for group in _SAME) and any(_is_within(key, name) for key in known)
        if not below and not any(_is_within(group, name) for group in _SAME):
            fix = "all others may differ anyway, or may not at all"
            raise ConfigError("allow_changes", got=name, allowed=f"{' | '.join(_SAME)}, or parts of them", fix=fix)


def refuse_changes(saved: Config, given: Config, *, allowed: Sequence[str]) -> None:
    """Compare the settings that make a run what it is.

    ConfigError for one that must not differ, or a name in `allowed` that may not; CheckpointError for those that may.
    """
    check_names(allowed, saved, given)
    before, now = _flat(saved), _flat(given)
    _refuse_another(_SEED, before, now, fix=f"batches and dropout masks are drawn from it: restore it, or {_NEW_RUN}")
    _refuse_other_states(before, now)
    _refuse_another_scheduler(before, now)
    differing = [
        name
        for name in sorted(before.keys() | now.keys())
        if any(_is_within(name, group) for group in _SAME)
        and not any(_is_within(name, group) for group in allowed)
        and before.get(name) != now.get(name)
    ]
    if differing:
        told = "; ".join(_difference(name, before, now) for name in differing)
        raise CheckpointError(
            f"the checkpoint is of a run with other settings: {told}. Resume it with its own, or insist"
            f" with --allow_changes '[{', '.join(differing)}]'"
        )


def _refuse_another(name: str, before: Config, now: Config, *, fix: str) -> None:
    if before.get(name) != now.get(name):
        allowed = f"{before.get(name)!r}, as in the checkpoint"
        raise ConfigError(name, got=now.get(name), allowed=allowed, fix=fix)


def _refuse_other_states(before: Config, now: Config) -> None:
    """The saved states fit no optimizer of another class, and none that needs more states."""
    classes = {_OPTIMIZER: _optimizer(before)}, {_OPTIMIZER: _optimizer(now)}
    _refuse_another(_OPTIMIZER, *classes, fix=f"its states are of no use to another: restore it, or {_NEW_RUN}")
    for name in (f"{_OPTIMIZER}.init_args.{setting}" for setting in _WITH_STATES):
        if now.get(name) and not before.get(name):
            fix = f"the states that it needs are not in there: restore it, or {_NEW_RUN}"
            _refuse_another(name, before, now, fix=fix)


def _refuse_another_scheduler(before: Config, now: Config) -> None:
    """A scheduler class resumes from its state, which depends on all its settings and the optimizer's."""
    classes = [{_SCHEDULER: str(flat.get(_SCHEDULER_CLASS))} for flat in (before, now)]
    if {_SCHEDULER: "None"} == classes[0] == classes[1]:
        return
    fix = f"the scheduler's state depends on it: restore it, or {_NEW_RUN}"
    _refuse_another(_SCHEDULER, *classes, fix=fix)
    for name in sorted(before.keys() | now.keys()):
        if _is_within(name, _SCHEDULER) or _is_within(name, _OPTIMIZER):
            _refuse_another(name, before, now, fix=fix)


def _difference(name: str, before: Config, now: Config) -> str:
    return f"{name}: got {now.get(name)!r}, the checkpoint has {before.get(name)!r}"


def _optimizer(flat: Config) -> str:
    path = str(flat.get(f"{_OPTIMIZER}.class_path") or flat.get(_OPTIMIZER))
    return _ITS_CLASS if path == _DEFAULT_OPTIMIZER else path


def _refuse_another_tokenizer(before: Config, now: Config) -> None:
    """A tokenizer that the run trains depends on its size; the datamodule compares the rest."""
    is_trained = before.get(_TOKENIZER) is now.get(_TOKENIZER) is None
    if is_trained and None not in (before.get(_VOCAB_SIZE), now.get(_VOCAB_SIZE)):
        fix = "the model knows the tokenizer that was trained to this size, and no other: restore it"
        _refuse_another(_VOCAB_SIZE, before, now, fix=fix)


def _warn_of_length(before: Config, now: Config, *, step: object) -> None:
    length = now.get(_LENGTH)
    if length is not None and isinstance(step, int) and 0 <= length <= step:
        _log.warning("%s %s: the checkpoint is of step %d, nothing is left to train", _LENGTH, length, step)
    idle = {"model.lr_schedule"} if _SCHEDULER_CLASS in now else set()  # a scheduler class replaces it
    stretched = [name for name, values in _STRETCHING if name not in idle and now.get(name) not in values]
    if stretched and before.get(_LENGTH) != length:  # a longer run may be what is wanted
        _log.warning(
            "%s: %s stretched with it, so that this run is no longer the one it would have been",
            _difference(_LENGTH, before, now),
            ", ".join(stretched) + (" is" if len(stretched) == 1 else " are"),
        )


def take_optimizer_settings(trainer: Trainer) -> None:
    """Use the configured settings of the optimizer instead of those that came with the checkpoint.

    Otherwise a learning rate that a user lowers for the rest of a run would be ignored silently. Under a scheduler
    class nothing may differ, so nothing is changed.
    """
    if not all(isinstance(entry.scheduler, LambdaLR) for entry in trainer.lr_scheduler_configs):
        return
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            given = {key: value for key, value in optimizer.defaults.items() if key in group}
            if all(parameter.dim() <= 1 for parameter in group["params"]):  # only matrices decay
                given.pop("weight_decay", None)
            group.update(given, initial_lr=given["lr"])
    for entry in trainer.lr_scheduler_configs:
        scheduler = entry.scheduler
        assert isinstance(scheduler, LambdaLR)
        groups = scheduler.optimizer.param_groups
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        for group, factor in zip(groups, scheduler.lr_lambdas, strict=True):
            group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)


def _flat(config: Config) -> dict[str, Any]:
    """The settings by their whole names."""
    return {name: value for name, value in walk(config, into_lists=False) if not isinstance(value, Mapping)}


def _is_within(name: str, group: str) -> bool:
    return name == group or name.startswith(f"{group}.")
