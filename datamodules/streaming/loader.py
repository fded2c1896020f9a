"""The training loader of a stream: which lane a batch comes from, and where every lane stands when a step ends.

Micro-batch `k` of rank `r` in a world of W comes from lane (k W + r) mod V, and of K workers the (k mod K)-th prepares
it; V is a multiple of W K, so that every lane has one owner. Global micro-batch k W + r is therefore the same whatever
W and K are.

Each batch brings along the state its lane has after it. What counts is the state of the batches that were trained on,
not of those that workers have prepared already; no loader has to be asked, stopped or replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from app.errors import DataError
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


class LaneBatches(IterableDataset[Any]):
    """The batches of one rank from a position on, without end; each worker yields those that are its turn.

    Args:
        sources: Each with its reader.
        encode: Texts to token ids.
        settings: Of the stream.
        batch_size: Rows a batch.
        share: Which batches are this rank's.
    """

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
        """Batches, each with its lane's number and state; or the error that ended a source."""
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        lanes: dict[int, Lane] = {}
        logged: list[set[BadRecord]] = [set() for _ in self._sources]
        k = self.position.batches + worker
        while True:
            number = (k * self._share.num_replicas + self._share.rank) % self._settings.num_lanes
            if number not in lanes:
                state = self.position.lanes.get(number, LaneState.start(len(self._sources)))
                lanes[number] = Lane(
                    self._sources,
                    lane=number,
                    encode=self._encode,
                    settings=self._settings,
                    state=state,
                    logged=logged,
                )
            try:
                yield stack([lanes[number].next_row() for _ in range(self._batch_size)]) | {
                    STATE_KEY: (number, lanes[number].state)
                }
            except DataError as error:  # a worker's exception would arrive as a traceback in a string
                yield error
                return
            k += workers


def stack(rows: Sequence[tuple[int, Row]]) -> dict[str, Any]:
    """Rows with their sources as a batch: `input_ids`, `labels`, `position_ids` [B, S] and `source` [B], int64."""
    columns = ("input_ids", "labels", "position_ids")
    batch = {name: torch.from_numpy(np.stack([getattr(row, name) for _, row in rows])).long() for name in columns}
    return batch | {"source": torch.tensor([source for source, _ in rows])}


class StreamLoader(WorkerLoader):
    """A loader of `LaneBatches`.

    Args:
        batches: What to load.
        position: Asked where to begin whenever an iteration does.
        num_workers: Processes that prepare batches.
        seed: Of the workers, which draw nothing from it; without one, torch would draw from its global generator.
    """

    def __init__(
        self, batches: LaneBatches, *, position: Callable[[], StreamPosition], num_workers: int, seed: int
    ) -> None:
        super().__init__(
            batches,
            batch_size=None,
            num_workers=num_workers,
            generator=torch.Generator().manual_seed(seed),
            worker_init_fn=prepare_worker,
        )
        self._batches, self._position = batches, position

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches.

        Nothing is read before the first is wanted: Lightning may ask for the iterator before it restores a checkpoint.

        Raises:
            DataError: A source has too many bad records, or no usable one.
            RuntimeError: A worker died.
        """
        self._batches.position = self._position()
        for item in super().__iter__():
            if isinstance(item, DataError):
                raise item
            yield item
