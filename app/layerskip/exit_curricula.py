"""Which exits are on at a step: C(t, l), LayerSkip (arXiv 2404.16710) section 4.1.2.

Pure functions of the optimizer step. Exits are counted in blocks run: exit_layer = l + 1; num_layers is the full model.
"""

from collections.abc import Sequence
from typing import Literal

ExitCurriculum = Literal["rotational", "gradual", "fixed", "none"]
EXIT_CURRICULA: tuple[ExitCurriculum, ...] = ("rotational", "gradual", "fixed", "none")


def rotational_exits(step: int, *, num_layers: int, interval: int, always_on_last: bool = True) -> tuple[int, ...]:
    """Rotational curriculum: the exit after block l is on when (l - t) mod R == 0, so each exit once in R steps.

    The interval R is in 1..L. `always_on_last` keeps the full model on, too: the paper does not say so, but its R = L-1
    implies it.
    """
    rotated = {layer_idx + 1 for layer_idx in range(num_layers) if (layer_idx - step) % interval == 0}
    return tuple(sorted(rotated | {num_layers} if always_on_last else rotated))


def gradual_exits(step: int, *, num_layers: int, total_steps: int) -> tuple[int, ...]:
    """Gradual curriculum: exits come on from the last to the first, one every T/(2L) steps, all by T/2.

    l is on when t >= (T/2) (L-1-l)/L. Comparing integers makes this exact.
    """
    return tuple(
        layer_idx + 1
        for layer_idx in range(num_layers)
        if 2 * num_layers * step >= total_steps * (num_layers - 1 - layer_idx)
    )


def exits_on(
    step: int,
    *,
    curriculum: ExitCurriculum,
    num_layers: int,
    rotation_interval: int,
    always_on_last: bool,
    total_steps: int | None,
    exit_layers: Sequence[int] = (),
) -> tuple[int, ...]:
    """The exits that are on at `step` under the named curriculum.

    `fixed`, which is not the paper's, has `exit_layers` and the full model on at every step, for budgets too small to
    train every exit. `none` has the full model alone.
    """
    if curriculum == "rotational":
        return rotational_exits(step, num_layers=num_layers, interval=rotation_interval, always_on_last=always_on_last)
    if curriculum == "gradual":
        if total_steps is None:
            raise ValueError("curriculum 'gradual' needs total_steps")
        return gradual_exits(step, num_layers=num_layers, total_steps=total_steps)
    return tuple(sorted({*exit_layers, num_layers})) if curriculum == "fixed" else (num_layers,)
