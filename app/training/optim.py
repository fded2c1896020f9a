"""Learning-rate schedules as pure functions of the optimizer step, and which parameters decay."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import nn

LRSchedule = Literal["constant", "linear", "cosine"]

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


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices take the optimizer's own weight decay; vectors (norms, biases) do not decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices, vectors = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
