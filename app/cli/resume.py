"""Which settings a resumed run may change, and what follows from those that it changes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from lightning.pytorch import Trainer
from torch.optim.lr_scheduler import LambdaLR

from app.errors import CheckpointError
from app.model.run_record import RUN_CONFIG_KEY

logger = logging.getLogger(__name__)

# What a run is. The data's order and tokenizer are the datamodule's to compare, the shape of the model the module's.
_SAME = (
    "seed_everything",
    "model.optimizer",
    "model.lr_schedule",
    "model.warmup_steps",
    "model.final_lr_ratio",
    "layer_dropout",
    "early_exit",
    "trainer.precision",
    "trainer.gradient_clip_val",
    "trainer.gradient_clip_algorithm",
)
_LENGTH = "trainer.max_steps"
_OF_LENGTH = (  # settings that make a run's course a function of its length, and their values that do not
    ("model.lr_schedule", ("constant",)),
    ("layer_dropout.time_scale", ("constant",)),
    ("early_exit.curriculum", ("rotational", "fixed", "none")),
)


def check_resume(checkpoint: dict[str, Any], given: Mapping[str, Any], *, allow_changes: Sequence[str]) -> None:
    """Compare the run that a checkpoint is of with the one that resumes it, before the loops are restored.

    Micro-batches are then counted as the resuming run counts them, so that it may have another number of devices.

    Args:
        checkpoint: As loaded; changed in place.
        given: Config of the resuming run, as nested plain values.
        allow_changes: Settings that may differ: names, or groups of them.

    Raises:
        CheckpointError: Naming what differs, and how to insist.
    """
    if RUN_CONFIG_KEY not in checkpoint:
        return
    saved = yaml.safe_load(checkpoint[RUN_CONFIG_KEY])
    refuse_changes(saved, given, allowed=allow_changes)
    accumulate = (config["trainer"]["accumulate_grad_batches"] for config in (saved, given))
    count_micro_batches(checkpoint, *accumulate)


def refuse_changes(saved: Mapping[str, Any], given: Mapping[str, Any], *, allowed: Sequence[str]) -> None:
    """Raise CheckpointError where settings differ that make a run what it is and may not; of its length, warn."""
    before, now = dict(_flat(saved)), dict(_flat(given))
    stretched = [name for name, values in _OF_LENGTH if now.get(name) not in values]
    if stretched and before.get(_LENGTH) != now.get(_LENGTH):  # a longer run is a thing to want
        logger.warning(
            "%s %s (given: %s): %s stretched with it, so that this run is no longer the one it would have been",
            *(_LENGTH, before.get(_LENGTH), now.get(_LENGTH)),
            ", ".join(stretched) + (" is" if len(stretched) == 1 else " are"),
        )
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


def count_micro_batches(checkpoint: dict[str, Any], saved: int, given: int) -> None:
    """Let the loops' counts of micro-batches be those of a run that accumulates `given` instead of `saved` a step.

    Lightning takes a step when their number is a multiple of it: without this, a run that goes on on another number of
    devices with the same global batch would take its next step after the wrong number of micro-batches.
    """
    if saved == given:
        return
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        ready = counts["ready"]
        if ready % saved:
            raise CheckpointError(
                f"trainer.accumulate_grad_batches: the checkpoint was saved within a step of {saved} micro-batches;"
                " resume it with that"
            )
        for kind in ("ready", "started", "processed", "completed"):  # the last may be one behind the others
            counts[kind] += ready // saved * given - ready


def take_optimizer_settings(trainer: Trainer) -> None:
    """Put the config's optimizer settings in the place of those that came with the checkpoint.

    Without this a learning rate that a user lowers for the rest of a run would be ignored without a word.
    """
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            given = {key: value for key, value in optimizer.defaults.items() if key in group}
            if not group["weight_decay"]:  # of vectors, whatever the setting for matrices is
                given.pop("weight_decay")
            group.update(given, initial_lr=given["lr"])
    for entry in trainer.lr_scheduler_configs:
        scheduler = entry.scheduler
        assert isinstance(scheduler, LambdaLR)  # LayerSkipModule's
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
