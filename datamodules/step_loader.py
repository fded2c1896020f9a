"""A training loader whose place in the data is a function of the optimizer step, and of nothing else.

Micro-batch `k` of rank `r` in a world of `W` takes rows `(k * W + r) * batch_size + [0, batch_size)` of the endless
stream, and optimizer step `t` begins at `k = t * accumulate_grad_batches`. So there is no position to save: Lightning
restores `trainer.global_step`, and the loader asks for it whenever an iteration begins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from datamodules.mixture import MixtureOrder
from datamodules.packing import PackedRows

RowIndex = tuple[int, int]  # source, row
Batch = dict[str, Tensor]


class RowDataset(Dataset[Batch]):
    """The packed rows of all sources, by (source index, row index)."""

    def __init__(self, sources: Sequence[PackedRows]) -> None:
        self._sources = sources

    def __getitem__(self, index: RowIndex) -> Batch:
        """One row: `input_ids`, `labels`, `position_ids` [S] int64, `source` [] int64."""
        source, row = index
        rows = self._sources[source]
        columns = {
            "input_ids": rows.input_ids,
            "labels": rows.labels,
            "position_ids": rows.position_ids,
        }
        item = {name: torch.from_numpy(column[row]).long() for name, column in columns.items()}
        return item | {"source": torch.tensor(source)}


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
        # not trainer.global_rank: tensor-parallel ranks share their data
        replicas = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        return cls(
            rank=replicas["rank"],
            world_size=replicas["num_replicas"],
            accumulate=trainer.accumulate_grad_batches,
            limit=trainer.limit_train_batches,
        )

    def epoch_batches(self, num_batches: int) -> int:
        """Micro-batches an epoch advances by: the limit applied, its last optimizer step counted as a whole one."""
        limited = min(num_batches, self.limit) if isinstance(self.limit, int) else num_batches * self.limit
        return max(1, math.ceil(int(limited) / self.accumulate)) * self.accumulate


class StepBatchSampler(Sampler[list[RowIndex]]):
    """Batches of row indices of one rank, from the current position to the end of the virtual epoch.

    Args:
        order: The endless stream of rows.
        num_rows: Rows in a virtual epoch, at least one batch of every rank; rounded down to whole optimizer steps.
        batch_size: Rows in a batch of one rank.
        place: Which of the batches are ours.
        position: Returns k, the micro-batch at which the current optimizer step begins.
    """

    def __init__(
        self,
        *,
        order: MixtureOrder,
        num_rows: int,
        batch_size: int,
        place: Placement,
        position: Callable[[], int],
    ) -> None:
        self._order = order
        self._batch_size = batch_size
        self._place = place
        self._position = position
        steps = num_rows // (batch_size * place.world_size * place.accumulate)
        self._num_batches = max(1, steps) * place.accumulate

    def __iter__(self) -> Iterator[list[RowIndex]]:
        start = self._position()
        epoch = self._place.epoch_batches(self._num_batches)
        for k in range(start, start - start % epoch + epoch):
            first = (k * self._place.world_size + self._place.rank) * self._batch_size
            yield [self._order.row(n) for n in range(first, first + self._batch_size)]

    def __len__(self) -> int:
        """Micro-batches of a full virtual epoch, before Lightning applies its limit."""
        return self._num_batches


class StepLoader(DataLoader[Batch]):
    """A DataLoader that asks for its position as late as possible, and that Lightning knows to be resumable.

    A schedule built on `trainer.estimated_stepping_batches` makes Lightning create the loader, and its iterator,
    before `global_step` is restored; worker processes would begin to fetch from step 0.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the position follows from the step."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore; with `state_dict` it tells Lightning that stopping inside an epoch is fine."""
