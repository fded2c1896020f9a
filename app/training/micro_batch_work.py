"""What a training micro-batch is about to compute: drawn outside the blocks, and shown to those who watch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule

from app.data_ranks import data_ranks
from app.layerskip.layer_dropout import KeptSamples, draw_kept_samples
from app.protocols import MicroBatchWork

WorkWatcher = Callable[[MicroBatchWork], None]


def draw_for(
    module: LightningModule, rates: Sequence[float], *, batch_size: int, batch_idx: int, seed: int, watched: bool
) -> KeptSamples | None:
    """The samples each block keeps in the micro-batch at hand, on the CPU; None when nothing can be dropped.

    Ranks that share weights ask together: they must know which blocks nobody needs, whatever rows each of them has.

    Args:
        module: At the step.
        rates: p(l, t), one for each block.
        batch_size: Samples in the micro-batch.
        batch_idx: Of the micro-batch, as Lightning counts.
        seed: Of the run.
        watched: Whether ranks compare their work, also where they share no weights or have no rate above 0.
    """
    trainer = module.trainer
    ranks, largest = data_ranks(trainer), batch_size
    if ranks.num_replicas > 1 and (watched or (any(rates) and module.device_mesh is not None)):
        everyones = torch.tensor(batch_size, device=module.device)
        dist.all_reduce(everyones, op=dist.ReduceOp.MAX)
        largest = int(everyones)
    if not any(rates):
        return None
    micro_step = batch_idx % trainer.accumulate_grad_batches
    return draw_kept_samples(
        rates,
        batch_size=batch_size,
        seed=seed,
        step=trainer.global_step,
        micro_batch=micro_step * ranks.num_replicas + ranks.rank,
        largest_batch=largest,
    )


def show(
    watchers: Sequence[WorkWatcher],
    kept: KeptSamples | None,
    *,
    batch_size: int,
    rates: tuple[float, ...],
    exit_weights: Mapping[int, float],
) -> None:
    """Show every watcher the work, as plain values."""
    if watchers:
        samples = None if kept is None else tuple(tuple(of_block.tolist()) for of_block in kept.by_block)
        most = None if kept is None else kept.most
        work = MicroBatchWork(batch_size, rates, samples, most, tuple(sorted(exit_weights.items())))
        for watch in watchers:
            watch(work)
