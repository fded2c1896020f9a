"""Layer dropout rates p(l, t) = S(t) D(l) p_max, LayerSkip (arXiv 2404.16710) section 4.1.1.

Pure functions of the block, `layer_idx` = 0..num_layers-1, and the optimizer step, `step` = 0..total_steps-1.
"""

from collections.abc import Callable, Mapping
from typing import Literal

DepthScale = Literal["exponential", "linear", "uniform"]
TimeScale = Literal["constant", "exponential", "linear", "decreasing"]

# D(l) as a function of the relative depth l/(L-1) in [0, 1].
DEPTH_SCALES: Mapping[DepthScale, Callable[[float], float]] = {
    "exponential": lambda depth: 2.0**depth - 1.0,  # the paper's
    "linear": lambda depth: depth,
    "uniform": lambda depth: 1.0,  # noqa: ARG005
}

# S(t) as a function of the progress t/(T-1) in [0, 1].
TIME_SCALES: Mapping[TimeScale, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,  # noqa: ARG005 - the paper's for fine-tuning and continual pretraining
    "exponential": lambda progress: 2.0**progress - 1.0,  # the paper's for pretraining from scratch
    "linear": lambda progress: progress,
    "decreasing": lambda progress: 1.0 - progress,
}


def depth_scale(layer_idx: int, *, num_layers: int, kind: DepthScale = "exponential") -> float:
    """D(l), paper section 4.1.1: D(l) = 2^(l/(L-1)) - 1, so D(0) = 0 and D(L-1) = 1.

    The only block of a model of one block is the first: its relative depth is 0.
    """
    return DEPTH_SCALES[kind](layer_idx / (num_layers - 1) if num_layers > 1 else 0.0)


def time_scale(step: int, *, total_steps: int | None, kind: TimeScale = "constant") -> float:
    """S(t), paper section 4.1.1: 1, or 2^(t/(T-1)) - 1 when training from scratch.

    Beyond the last step the schedule keeps its final value. T, `total_steps`, may be None only where
    `needs_total_steps(kind)` is false.
    """
    if total_steps is None:
        if needs_total_steps(kind):
            raise ValueError(f"time_scale {kind!r} needs total_steps")
        return TIME_SCALES[kind](0.0)
    return TIME_SCALES[kind](min(1.0, step / (total_steps - 1)) if total_steps > 1 else 0.0)


def needs_total_steps(kind: TimeScale) -> bool:
    """Whether S(t) depends on the length of the run."""
    return kind != "constant"


def dropout_rates(
    step: int,
    *,
    num_layers: int,
    max_dropout_rate: float,
    depth: DepthScale = "exponential",
    time: TimeScale = "constant",
    total_steps: int | None = None,
) -> tuple[float, ...]:
    """p(l, t) = S(t) D(l) p_max for every block at one step, paper section 4.1.1."""
    now = time_scale(step, total_steps=total_steps, kind=time) * max_dropout_rate
    return tuple(now * depth_scale(idx, num_layers=num_layers, kind=depth) for idx in range(num_layers))
