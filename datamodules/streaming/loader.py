"""The training loader of a stream: which lane a batch comes from, and what state of the lane it brings along.

Micro-batch `k` of rank `r` of W comes from lane (k W + r) mod V, and of K workers the (k mod K)-th prepares it. V is a
multiple of W K, so every lane has one owner, and global micro-batch k W + r is the same whatever W and K are.

Each batch brings along the state that its lane has after it. The states that count are those of the batches that were
trained on, not of those that workers have prepared already, so no loader has to be asked, stopped or replayed.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from app.errors import ConfigError, DataError
from datamodules.loading.rank_share import RankShare
from datamodules.loading.tokenizers import Encoder
from datamodules.loading.workers import WorkerLoader, prepare_worker
from datamodules.readers.records import BadRecord, Reader
from datamodules.readers.sources import Source
from datamodules.streaming.packing import Row
from datamodules.streaming.position import StreamPosition
from datamodules.streaming.source_blocks import StreamSettings
from datamodules.streaming.stream import Lane, LaneState

STATE_KEY = "lane_state"


def check_lanes(num_lanes: int, *, num_replicas: int, workers: int) -> None:
    """Raise ConfigError if ranks and workers have not equally many lanes; `workers` is 1 where a rank reads itself."""
    if num_lanes % num_replicas:
        raise ConfigError(
            "num_lanes",
            got=num_lanes,
            allowed=f"a multiple of {num_replicas}, the number of ranks",
            fix="a resumed run keeps its lanes: change the number of devices",
        )
    if (own := num_lanes // num_replicas) % workers:
        allowed = f"a divisor of {own}: each of {num_replicas} ranks has {own} of the {num_lanes} lanes"
        raise ConfigError("num_workers", got=workers, allowed=allowed)


class LaneBatches(IterableDataset[Any]):
    """The batches of one rank from `position` on, without end; each worker yields those that are its turn."""

    def __init__(
        self,
        sources: Sequence[tuple[Source, Reader]],
        *,
        encode: Encoder,
        settings: StreamSettings,
        batch_size: int,
        share: RankShare,
    ) -> None:
        self._sources, self._encode, self._settings = sources, encode, settings
        self._batch_size, self._share = batch_size, share
        self.position = StreamPosition(0, {})

    def __iter__(self) -> Iterator[Any]:
        """Yield batches, each with its lane's number and state; or the error that ended a source."""
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        lanes: dict[int, Lane] = {}
        logged: list[set[BadRecord]] = [set() for _ in self._sources]
        k = self.position.batches + worker
        while True:
            number = (k * self._share.num_replicas + self._share.rank) % self._settings.num_lanes
            if number not in lanes:
                lanes[number] = Lane(
                    self._sources,
                    lane=number,
                    encode=self._encode,
                    settings=self._settings,
                    state=self.position.lanes.get(number, LaneState.start(len(self._sources))),
                    logged=logged,
                )
            try:
                batch = stack([lanes[number].next_row() for _ in range(self._batch_size)])
            except DataError as error:  # a worker's exception would arrive as a traceback in a string
                yield error
                return
            yield batch | {STATE_KEY: (number, lanes[number].state)}
            k += workers


def stack(rows: Sequence[tuple[int, Row]]) -> dict[str, Any]:
    """Rows with their sources as a batch: `input_ids`, `labels`, `position_ids` [B, S] and `source` [B], int64."""
    columns = ("input_ids", "labels", "position_ids")
    batch = {name: torch.from_numpy(np.stack([getattr(row, name) for _, row in rows])).long() for name in columns}
    return batch | {"source": torch.tensor([source for source, _ in rows])}


class StreamLoader(WorkerLoader):
    """A loader of `LaneBatches` that asks `position` where to begin whenever an iteration does."""

    def __init__(
        self, batches: LaneBatches, *, position: Callable[[], StreamPosition], num_workers: int, seed: int
    ) -> None:
        super().__init__(
            batches,
            batch_size=None,
            num_workers=num_workers,
            generator=torch.Generator().manual_seed(seed),  # else torch would draw from its global generator
            worker_init_fn=prepare_worker,
        )
        self._batches, self._position = batches, position

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield batches, or raise DataError as `Lane.next_row`; nothing is read before the first is asked for."""
        self._batches.position = self._position()
        for item in super().__iter__():
            if isinstance(item, DataError):
                raise item
            yield item
