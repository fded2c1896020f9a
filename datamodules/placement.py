"""Which part of the training batches a process takes, and which trainers would upset that."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer

from app.data_ranks import data_ranks
from app.errors import ConfigError, DataError, check_range

# Of a socket's path the kernel takes 107 bytes; multiprocessing appends a folder and a name, of 14 and 18.
_MOST_WORKERS = 1024  # processes; no machine has the memory for more
_LONGEST_TEMPORARY_FOLDER = 107 - 14 - 18


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Which part of the stream this process takes.

    Args:
        rank: r, among the processes with different data.
        world_size: W, the number of those.
        accumulate: Micro-batches in an optimizer step.
        limit: Lightning's `limit_train_batches`: a number of micro-batches (int) or a share of the epoch (float).
    """

    rank: int = 0
    world_size: int = 1
    accumulate: int = 1
    limit: int | float = 1.0

    @classmethod
    def of(cls, trainer: Trainer | None) -> Placement:
        """Read from `trainer`; one process without accumulation if there is none."""
        if trainer is None:
            return cls()
        ranks = data_ranks(trainer)
        return cls(
            rank=ranks.rank,
            world_size=ranks.size,
            accumulate=trainer.accumulate_grad_batches,
            limit=trainer.limit_train_batches,
        )

    @property
    def micro_batches(self) -> int:
        """M, of all ranks in an optimizer step."""
        return self.world_size * self.accumulate

    def epoch_steps(self, num_steps: int) -> int:
        """Optimizer steps an epoch advances by: the limit applied, the last one counted as a whole one."""
        num_batches = num_steps * self.accumulate
        limited = min(num_batches, self.limit) if isinstance(self.limit, int) else num_batches * self.limit
        return max(1, math.ceil(int(limited) / self.accumulate))

    def share(self, num_rows: int, *, more: str) -> int:
        """Of held-out rows, as many for each rank: all run equally many batches.

        Args:
            num_rows: Of all ranks.
            more: What brings more of them.

        Raises:
            DataError: There is not one for each rank.
        """
        if num_rows < self.world_size:
            raise DataError(f"held-out rows ({num_rows}) are fewer than devices ({self.world_size}); {more}")
        return num_rows // self.world_size


def check_workers(num_workers: int) -> None:
    """Refuse a number of data workers out of range, and workers that would wait for sockets they cannot open.

    Raises:
        ConfigError: Naming the setting.
    """
    check_range("num_workers", num_workers, low=0, high=_MOST_WORKERS)
    folder = tempfile.gettempdir()
    if num_workers and len(folder.encode()) > _LONGEST_TEMPORARY_FOLDER:
        got = f"{folder} ({len(folder.encode())} bytes)"
        raise ConfigError(
            "TMPDIR",
            got=got,
            allowed=f"at most {_LONGEST_TEMPORARY_FOLDER} bytes with data workers, whose sockets lie in there",
            fix="set a shorter one, or data.num_workers 0",
        )


def check_trainer(trainer: Trainer) -> None:
    """Refuse a trainer that would shard or repeat batches that have their place already.

    Raises:
        ConfigError: Naming the setting.
    """
    divides = trainer._accelerator_connector.use_distributed_sampler  # it has no public name
    if divides and Placement.of(trainer).world_size > 1:
        raise ConfigError(
            "trainer.use_distributed_sampler",
            got=True,
            allowed="False on more than one device",
            fix="batches are divided among the ranks already; Lightning would divide them again",
        )
    overfit: float = trainer.overfit_batches  # type: ignore[attr-defined]  # Lightning sets it by setattr
    if overfit:
        raise ConfigError("trainer.overfit_batches", got=overfit, allowed="0", fix="train on less data instead")


def check_end(trainer: Trainer) -> None:
    """Refuse a trainer that would wait for the end of a stream that has none.

    Raises:
        ConfigError: Naming the setting.
    """
    if isinstance(trainer.limit_train_batches, int):  # that many batches are an epoch
        return
    if trainer.max_steps < 1 and not any(isinstance(callback, Timer) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise ConfigError("trainer.max_steps", got=trainer.max_steps, allowed=">= 1: the stream of batches has no end")
    interval = getattr(trainer, "val_check_interval", None)  # there is none where validation goes by the clock
    if isinstance(interval, float) and trainer.limit_val_batches:  # a share of an epoch
        allowed = "a number of batches: the stream of batches has no epochs"
        raise ConfigError("trainer.val_check_interval", got=interval, allowed=allowed)
