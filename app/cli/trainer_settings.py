"""What no run can mean: settings that Lightning divides by, takes silently, or lets lead out of their folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from jsonargparse import Namespace

from app.errors import ConfigError, check_range

_LARGEST = 2**63 - 1  # that a tensor holds
_MOST_MICRO_BATCHES = 1_000_000  # of a step
_MOST_PROCESSES = max(64, os.cpu_count() or 1)  # on a CPU, where Lightning starts as many as it is told to
_HEADS = ("num_attention_heads", "num_key_value_heads")  # transformers divides by them
_PARTS_OF_PATHS = ("name", "version", "sub_dir", "filename")  # of loggers and checkpoint callbacks, below a folder


def check_numbers(config: Namespace) -> None:
    """Refuse whole numbers that 64 bits do not hold, wherever they stand, and models without heads.

    Raises:
        ConfigError: Naming the first.
    """
    for path, value in _walk(config.as_dict()):
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
    check_range("trainer.accumulate_grad_batches", trainer["accumulate_grad_batches"], low=1, high=_MOST_MICRO_BATCHES)
    check_range("trainer.num_sanity_val_steps", trainer["num_sanity_val_steps"] or 0, low=-1)
    if str(trainer["devices"]).isdecimal() and trainer["accelerator"] != "cuda":
        check_range("trainer.devices", int(trainer["devices"]), low=0, high=_MOST_PROCESSES)
    check_range("trainer.gradient_clip_val", trainer["gradient_clip_val"] or 0, low=0)
    check_range("trainer.log_every_n_steps", trainer["log_every_n_steps"] or 0, low=0)
    if (epochs := trainer["check_val_every_n_epoch"]) is not None:
        check_range("trainer.check_val_every_n_epoch", epochs, low=1)
    never = "to validate never, set trainer.limit_val_batches 0"
    if trainer["val_check_interval"] in (0, 0.0):
        allowed = "a number of batches, at least 1; a share of an epoch, (0, 1]; or a time, DD:HH:MM:SS"
        raise ConfigError("trainer.val_check_interval", got=0, allowed=allowed, fix=never)
    if verb == "fit" and trainer["limit_train_batches"] in (0, 0.0):
        raise ConfigError("trainer.limit_train_batches", got=0, allowed="more than 0, or nothing is trained")
    if verb == "fit" and trainer["max_epochs"] == 0:
        raise ConfigError("trainer.max_epochs", got=0, allowed="more than 0, or nothing is trained")
    for group in ("logger", "callbacks"):
        for path, value in _walk(_plain(trainer[group]), f"trainer.{group}"):
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


def _walk(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        below = f"{path}.{key}" if path else str(key)
        yield below, value
        yield from _walk(value, below)
