"""Learning-rate schedules: pure functions of the optimizer step, or torch's classes; and which parameters decay."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from app.errors import ConfigError, require_total_steps

LRSchedule = Literal["constant", "linear", "cosine"]

LRSchedulerClass = Callable[[Optimizer], LRScheduler]  # with its settings

# Share of the way from the peak to the final rate still to go, as a function of the progress in [0, 1].
LR_SCHEDULES: Mapping[LRSchedule, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,  # noqa: ARG005
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def lr_factor(step: int, *, kind: LRSchedule, warmup_steps: int, total_steps: int | None, final_ratio: float) -> float:
    """Factor on the peak learning rate at `step`: linear warmup, then `kind` down to `final_ratio`.

    Args:
        step: Optimizer steps done.
        kind: A key of LR_SCHEDULES; all but constant need `total_steps`.
        warmup_steps: Steps to reach the peak; the first step already moves.
        total_steps: Length of the run, or None if unbounded.
        final_ratio: Rate at the last step over the peak.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if kind == "constant":
        return 1.0
    if total_steps is None:
        raise ValueError(f"lr_schedule {kind!r} needs total_steps")
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return final_ratio + (1.0 - final_ratio) * LR_SCHEDULES[kind](progress)


def scheduler_of_kind(
    optimizer: Optimizer, kind: LRSchedule, *, warmup_steps: int, final_ratio: float, max_steps: int
) -> LambdaLR:
    """The rate of an optimizer by `lr_factor`, in a run of `max_steps`, -1 if unbounded.

    Raises:
        ConfigError: The schedule needs an end, and the run has none.
    """
    total = None if kind == "constant" else require_total_steps(max_steps, field="lr_schedule", got=kind)
    factor = partial(lr_factor, kind=kind, warmup_steps=warmup_steps, total_steps=total, final_ratio=final_ratio)
    return LambdaLR(optimizer, factor)


def scheduler_of_class(optimizer: Optimizer, make: LRSchedulerClass, *, max_steps: int) -> LRScheduler:
    """The rate of an optimizer by a scheduler class with its settings, in a run of `max_steps`, -1 if unbounded.

    Raises:
        ConfigError: The class does not take its settings, waits for a metric, or ends before the run does.
    """
    try:
        scheduler = make(optimizer)
    except (TypeError, ValueError) as error:
        raise ConfigError("lr_scheduler", got=str(error), allowed="settings its class accepts") from error
    name = type(scheduler).__name__
    if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
        raise ConfigError("lr_scheduler", got=name, allowed="a class that is stepped each step, without a metric")
    if isinstance(scheduler, OneCycleLR):
        total = require_total_steps(max_steps, field="lr_scheduler", got=name)
        if scheduler.total_steps < total:
            got = f"{name} of {scheduler.total_steps} steps"
            raise ConfigError("lr_scheduler", got=got, allowed=f"at least {total}, as trainer.max_steps")
    return scheduler


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices take the optimizer's own weight decay; vectors (norms, biases) do not decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices, vectors = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
