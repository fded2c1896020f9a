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
    """What one rank is about to compute, by names for messages, the most telling first."""

    data_rank: int  # the same on ranks that share rows
    alike: dict[str, object]  # what must be the same on all ranks
    of_rows: dict[str, object]  # what must be the same on ranks that share rows


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
        step = f"step {trainer.global_step}, micro-batch {self._micro_batch}"
        own = _rank_work(work, data_rank=data_ranks(trainer).rank, step=step)
        hashes = torch.tensor([_hash(own.alike), _hash(own.of_rows), own.data_rank], device=pl_module.device)
        gathered = [torch.empty_like(hashes) for _ in range(trainer.world_size)]
        dist.all_gather(gathered, hashes)
        for_all, of_rows, by_data_rank = zip(*(of_rank.tolist() for of_rank in gathered), strict=True)
        num_data_ranks = len(set(by_data_rank))
        if len(set(for_all)) == 1 and len(set(zip(by_data_rank, of_rows, strict=True))) == num_data_ranks:
            return
        by_rank: list[_RankWork] = [own] * trainer.world_size
        dist.all_gather_object(by_rank, own)  # all ranks have compared the same hashes, so all of them are here
        raise DisagreementError(
            f"ranks were about to compute different things at {step}: {next(_differences(by_rank))}; no forward was"
            " run. Give all nodes the same config, seed, code and package versions"
        )


def _rank_work(work: MicroBatchWork, *, data_rank: int, step: str) -> _RankWork:
    blocks = range(len(work.dropout_rates))
    alike: dict[str, object] = {"step and micro-batch": step, "exits and weights": work.exit_weights}
    alike |= {f"block {block}: rate": work.dropout_rates[block] for block in blocks}
    alike |= {f"block {block}: samples kept": work.most_kept and work.most_kept[block] for block in blocks}
    of_rows: dict[str, object] = {"samples in the batch": work.batch_size}
    for block, samples in enumerate(work.kept_samples or ()):
        of_rows[f"block {block}: which samples are kept of the same rows"] = samples
    return _RankWork(data_rank, alike, of_rows)


def _hash(value: object) -> int:
    """Return a hash of 63 bits that is the same in every process."""
    return int.from_bytes(blake2b(repr(value).encode(), digest_size=8).digest(), "little") >> 1


def _differences(by_rank: list[_RankWork]) -> Iterator[str]:
    """Return what differs, and what each rank has, the most telling first."""
    yield from _differing({rank: work.alike for rank, work in enumerate(by_rank)})
    for data_rank in sorted({work.data_rank for work in by_rank}):
        yield from _differing({rank: work.of_rows for rank, work in enumerate(by_rank) if work.data_rank == data_rank})
    yield "number of blocks"


def _differing(by_rank: Mapping[int, Mapping[str, object]]) -> Iterator[str]:
    for name in next(iter(by_rank.values())):
        values = {rank: own[name] for rank, own in by_rank.items() if name in own}
        if len({repr(value) for value in values.values()}) > 1:
            yield f"{name}: " + ", ".join(f"{value} on rank {rank}" for rank, value in values.items())
