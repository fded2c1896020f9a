"""Learning rates by optimizer step, and which parameters decay. Tested by tests/unit/training/test_module.py."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from app.errors import ConfigError, check_choice, check_range, require_total_steps

_log = logging.getLogger(__name__)

LRSchedule = Literal["constant", "linear", "cosine"]

LRSchedulerClass = Callable[[Optimizer], LRScheduler]  # with its settings

# The part of the way from the peak to the final rate that is left, as a function of the progress in [0, 1].
LR_SCHEDULES: Mapping[LRSchedule, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,  # noqa: ARG005
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def lr_factor(step: int, *, kind: LRSchedule, warmup_steps: int, total_steps: int | None, final_ratio: float) -> float:
    """Factor on the peak learning rate after `step` optimizer steps: linear warmup, then `kind` down to `final_ratio`.

    The first step already moves. Every kind but constant needs `total_steps`, the length of the run.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if kind == "constant":
        return 1.0
    assert total_steps is not None
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return final_ratio + (1.0 - final_ratio) * LR_SCHEDULES[kind](progress)


@dataclass(frozen=True)
class LearningRate:
    """The settings of LayerSkipModule for the learning rate; `scheduler`, a class, replaces the other three."""

    kind: LRSchedule
    warmup_steps: int
    final_ratio: float
    scheduler: LRSchedulerClass | None

    def __post_init__(self) -> None:
        check_choice("lr_schedule", self.kind, LR_SCHEDULES)
        check_range("warmup_steps", self.warmup_steps, low=0)
        check_range("final_lr_ratio", self.final_ratio, low=0, high=1)
        if self.scheduler is not None and (self.kind, self.warmup_steps, self.final_ratio) != ("cosine", 0, 0.1):
            _log.warning("lr_schedule, warmup_steps and final_lr_ratio have no effect: lr_scheduler replaces them")

    def scheduler_of(self, optimizer: Optimizer, *, max_steps: int) -> LRScheduler:
        """The scheduler of an optimizer in a run of `max_steps`, -1 if unbounded; ConfigError if it needs an end."""
        if self.scheduler is not None:
            return scheduler_of_class(optimizer, self.scheduler, max_steps=max_steps)
        total_steps = None
        if self.kind != "constant":
            total_steps = require_total_steps(max_steps, field="lr_schedule", got=self.kind)
        factor = partial(
            lr_factor,
            kind=self.kind,
            warmup_steps=self.warmup_steps,
            total_steps=total_steps,
            final_ratio=self.final_ratio,
        )
        return LambdaLR(optimizer, factor)


def scheduler_of_class(optimizer: Optimizer, make: LRSchedulerClass, *, max_steps: int) -> LRScheduler:
    """A scheduler class with its settings, for an optimizer in a run of `max_steps`, -1 if unbounded.

    ConfigError if the class does not take its settings, waits for a metric, or ends before the run does.
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
