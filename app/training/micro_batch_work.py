"""Draws the samples that each block keeps in a training micro-batch, so that all ranks keep as many.

All ranks draw the count from the seed that they share (`app.layerskip.layer_dropout`). Ranks that share weights also
agree on the largest micro-batch among them, by an all_reduce here. Tested by tests/distributed/test_agreement.py.
"""

from collections.abc import Callable, Sequence

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
    """The samples that each block keeps in the micro-batch at hand, on the CPU; None if none can be dropped.

    Ranks that share weights call it together: whatever rows each has, all must know which blocks no rank needs. So do
    ranks that compare their work (`watched`), also if no rate p(l, t) is above 0.
    """
    trainer = module.trainer
    (rank, num_replicas), largest = data_ranks(trainer), batch_size
    if num_replicas > 1 and (watched or (any(rates) and module.device_mesh is not None)):
        of_all_ranks = torch.tensor(batch_size, device=module.device)
        dist.all_reduce(of_all_ranks, op=dist.ReduceOp.MAX)
        largest = int(of_all_ranks)
    if not any(rates):
        return None
    micro_step = batch_idx % trainer.accumulate_grad_batches
    return draw_kept_samples(
        rates,
        batch_size=batch_size,
        seed=seed,
        step=trainer.global_step,
        micro_batch=micro_step * num_replicas + rank,
        largest_batch=largest,
    )
