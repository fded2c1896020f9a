"""What no run can mean: settings that Lightning divides by, takes silently, or lets lead out of their folder."""

from __future__ import annotations

import os
from pathlib import PurePath
from typing import Any

from jsonargparse import Namespace

from app.cli.messages import walk
from app.errors import ConfigError, check_range

_LARGEST = 2**63 - 1  # that a tensor holds
_MOST_PROCESSES = max(64, os.cpu_count() or 1)  # on a CPU, where Lightning starts as many as it is told to
_RANGES = {  # what Lightning takes silently outside of them
    "accumulate_grad_batches": (1, 1_000_000),
    "num_sanity_val_steps": (-1, None),
    "gradient_clip_val": (0, None),
    "log_every_n_steps": (0, None),
    "check_val_every_n_epoch": (1, None),
    "min_steps": (0, None),
    "min_epochs": (0, None),
}
_HEADS = ("num_attention_heads", "num_key_value_heads")  # transformers divides by them
_PARTS_OF_PATHS = ("name", "version", "sub_dir", "filename")  # of loggers and checkpoint callbacks, below a folder


def check_numbers(config: Namespace) -> None:
    """Refuse whole numbers that 64 bits do not hold, wherever they stand, and models without heads.

    Raises:
        ConfigError: Naming the first.
    """
    for path, value in walk(config.as_dict()):
        if isinstance(value, int):
            check_range(path, value, low=1 if path.endswith(_HEADS) else -_LARGEST, high=_LARGEST)


def check_trainer_settings(trainer: Namespace, *, verb: str) -> None:
    """Refuse what Lightning would divide by, take silently, or write elsewhere than it is told to.

    Args:
        trainer: The group of its settings, parsed.
        verb: Of Lightning's.

    Raises:
        ConfigError: Naming the first.
    """
    for name, (low, high) in _RANGES.items():
        if trainer[name] is not None:
            check_range(f"trainer.{name}", trainer[name], low=low, high=high)
    if str(trainer["devices"]).isdecimal() and trainer["accelerator"] != "cuda":
        check_range("trainer.devices", int(trainer["devices"]), low=0, high=_MOST_PROCESSES)
    never = "to validate never, set trainer.limit_val_batches 0"
    if trainer["val_check_interval"] in (0, 0.0):
        allowed = "a number of batches, at least 1; a share of an epoch, (0, 1]; or a time, DD:HH:MM:SS"
        raise ConfigError("trainer.val_check_interval", got=0, allowed=allowed, fix=never)
    for name in ("limit_train_batches", "max_epochs") if verb == "fit" else ():
        if trainer[name] in (0, 0.0):
            raise ConfigError(f"trainer.{name}", got=0, allowed="more than 0, or nothing is trained")
    for group in ("logger", "callbacks"):
        for path, value in walk(_plain(trainer[group]), f"trainer.{group}"):
            *_, owner, name = path.split(".")
            if owner == "init_args" and name in _PARTS_OF_PATHS and isinstance(value, str):
                _check_below(path, value)


def without_progress_bar(callbacks: Any) -> Any:
    """The callbacks but for progress bars: a run that is to show none does without those that its config lists."""
    from lightning.pytorch.callbacks import ProgressBar

    given = callbacks if isinstance(callbacks, list) else [callbacks]
    return [callback for callback in given if callback is not None and not isinstance(callback, ProgressBar)]


def _check_below(path: str, value: str) -> None:
    part = PurePath(value)
    if part.is_absolute() or ".." in part.parts:
        fix = "the folder itself is save_dir of a logger, dirpath of a checkpoint callback"
        raise ConfigError(path, got=value, allowed="a name or path below its folder, without '..'", fix=fix)


def _plain(value: Any) -> Any:
    if isinstance(value, Namespace):
        return value.as_dict()
    return [_plain(entry) for entry in value] if isinstance(value, list) else value
