"""What a training micro-batch is about to compute: drawn outside the blocks, and shown to those who watch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lightning.pytorch import Trainer
from torch import Tensor

from app.data_ranks import data_ranks
from app.layerskip.layer_dropout import draw_kept_samples
from app.protocols import StepPlan

PlanWatcher = Callable[[StepPlan], None]


def draw_for(
    trainer: Trainer, rates: Sequence[float], *, batch_size: int, batch_idx: int, seed: int
) -> tuple[Tensor, ...] | None:
    """The samples each block keeps in the micro-batch at hand, on the CPU; None when nothing can be dropped.

    Args:
        trainer: At the step.
        rates: p(l, t), one for each block.
        batch_size: Samples in the micro-batch.
        batch_idx: Of the micro-batch, as Lightning counts.
        seed: Of the run.
    """
    if not any(rates):
        return None
    ranks = data_ranks(trainer)
    micro_step = batch_idx % trainer.accumulate_grad_batches
    return draw_kept_samples(
        rates,
        batch_size=batch_size,
        seed=seed,
        step=trainer.global_step,
        micro_batch=micro_step * ranks.size + ranks.rank,
    )


def show(
    watchers: Sequence[PlanWatcher],
    kept: Sequence[Tensor] | None,
    *,
    batch_size: int,
    rates: tuple[float, ...],
    exit_weights: Mapping[int, float],
) -> None:
    """Tell every watcher the plan, as plain values."""
    if watchers:
        samples = None if kept is None else tuple(tuple(of_block.tolist()) for of_block in kept)
        plan = StepPlan(batch_size, rates, samples, tuple(sorted(exit_weights.items())))
        for watch in watchers:
            watch(plan)
