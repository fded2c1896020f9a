"""A debug check that all ranks are about to run the same blocks, exits and numbers of samples.

Under FSDP2 nothing else notices a difference. Ranks that skip equally many, but different blocks pair one block's
weights with another's and train on without an error; ranks that skip different numbers of blocks wait for ever.
Tested by tests/distributed/test_agreement.py.
"""

from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from app.data_ranks import data_ranks
from app.errors import ConfigError, DisagreementError, check_range
from app.protocols import MicroBatchWork, WorkHost


class _RankWork(NamedTuple):
    """What one rank is about to compute; ranks with the same `data_rank` share rows."""

    step: int
    micro_batch: int
    data_rank: int
    work: MicroBatchWork


class DropoutAgreementCheck(Callback):
    """Compare hashes of the ranks' work before the forward: one collective of 24 bytes a rank, and a wait for it.

    All ranks must have the same step, rates, numbers of samples that each block keeps of the largest batch (so the
    same blocks skipped whole), exits and weights. Ranks that share rows (tensor parallelism) must also have the same
    number of samples and keep the same ones. Ranks with rows of their own may have more or fewer.

    Args:
        every_n_steps: Optimizer steps between two checks, >= 1; all micro-batches of such a step are checked.
    """

    def __init__(self, *, every_n_steps: int = 1) -> None:
        check_range("every_n_steps", every_n_steps, low=1)
        self.every_n_steps = every_n_steps

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, WorkHost):
            raise ConfigError("model", got=type(pl_module).__name__, allowed="a protocols.WorkHost")
        if stage == "fit":
            pl_module.watch_work(lambda work: self._check(trainer, pl_module, work))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        self._micro_batch = batch_idx % trainer.accumulate_grad_batches

    def _check(self, trainer: Trainer, pl_module: LightningModule, work: MicroBatchWork) -> None:
        if trainer.world_size == 1 or trainer.global_step % self.every_n_steps:
            return
        own = _RankWork(trainer.global_step, self._micro_batch, data_ranks(trainer).rank, work)
        alike = _hash((own.step, own.micro_batch, work.dropout_rates, work.exit_weights, work.most_kept))
        alike_on_same_rows = _hash((work.batch_size, work.kept_samples))
        hashes = torch.tensor([alike, alike_on_same_rows, own.data_rank], device=pl_module.device)
        gathered = [torch.empty_like(hashes) for _ in range(trainer.world_size)]
        dist.all_gather(gathered, hashes)
        for_all, of_rows, by_data_rank = zip(*(of_rank.tolist() for of_rank in gathered), strict=True)
        num_data_ranks = len(set(by_data_rank))
        if len(set(for_all)) == 1 and len(set(zip(by_data_rank, of_rows, strict=True))) == num_data_ranks:
            return
        by_rank: list[_RankWork] = [own] * trainer.world_size
        dist.all_gather_object(by_rank, own)  # all ranks have compared the same hashes, so all of them are here
        raise DisagreementError(
            f"ranks were about to compute different things at step {own.step}, micro-batch {own.micro_batch}:"
            f" {next(_differences(by_rank))}; no forward was run. Give all nodes the same config, seed, code and"
            " package versions"
        )


def _hash(value: object) -> int:
    """Return a hash of 63 bits that is the same in every process."""
    return int.from_bytes(blake2b(repr(value).encode(), digest_size=8).digest(), "little") >> 1


def _differences(by_rank: list[_RankWork]) -> Iterator[str]:
    """Return what differs, and what each rank has, the most telling first."""
    yield from _differing("step and micro-batch", {rank: (w.step, w.micro_batch) for rank, w in enumerate(by_rank)})
    yield from _differing("exits and weights", {rank: w.work.exit_weights for rank, w in enumerate(by_rank)})
    blocks = range(min(len(w.work.dropout_rates) for w in by_rank))
    for block in blocks:
        yield from _differing(f"block {block}: rate", {r: w.work.dropout_rates[block] for r, w in enumerate(by_rank)})
    for block in blocks:
        most = {rank: w.work.most_kept and w.work.most_kept[block] for rank, w in enumerate(by_rank)}
        yield from _differing(f"block {block}: samples kept", most)
    for data_rank in sorted({w.data_rank for w in by_rank}):
        alike = {rank: w.work for rank, w in enumerate(by_rank) if w.data_rank == data_rank}
        yield from _differing("samples in the batch", {rank: work.batch_size for rank, work in alike.items()})
        for block in range(len(next(iter(alike.values())).kept_samples or ())):
            kept = {rank: work.kept_samples and work.kept_samples[block] for rank, work in alike.items()}
            yield from _differing(f"block {block}: which samples are kept of the same rows", kept)
    yield "number of blocks"


def _differing(what: str, values: Mapping[int, object]) -> Iterator[str]:
    if len({repr(value) for value in values.values()}) > 1:
        yield f"{what}: " + ", ".join(f"{value} on rank {rank}" for rank, value in values.items())
