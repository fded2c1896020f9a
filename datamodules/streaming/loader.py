"""The training loader of a stream: which lane a batch comes from, and where all lanes of all ranks stand.

Micro-batch `k` of rank `r` of W comes from lane (k W + r) mod V, and of K workers the (k mod K)-th prepares it. V is a
multiple of W K, so every lane has one owner, and global micro-batch k W + r is the same whatever W and K are.

Each batch brings along the state that its lane has after it. The states that count are those of the batches that were
trained on, not of those that workers have prepared already, so no loader has to be asked, stopped or replayed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from app.checkpoints.entries import SavedEntry
from app.errors import ConfigError, DataError
from app.protocols import SourceStatistics
from datamodules.loading.rank_share import RankShare
from datamodules.loading.tokenizers import Encoder
from datamodules.loading.workers import WorkerLoader, prepare_worker
from datamodules.readers.records import BadRecord, Reader
from datamodules.readers.sources import Source
from datamodules.streaming.packing import Row
from datamodules.streaming.source_blocks import StreamSettings
from datamodules.streaming.stream import Lane, LaneState, SourceState, from_lists, to_lists

STATE_KEY = "lane_state"


@dataclass(frozen=True)
class StreamPosition:
    """The micro-batches that every rank trained on, and the state of each lane that delivered some, by its index."""

    batches: int
    lanes: Mapping[int, LaneState]


def check_position(state: Mapping[str, Any], *, num_sources: int) -> None:
    """Raise CheckpointError, naming the entry, if a saved state is no position of a stream."""
    saved = SavedEntry(state, "data")
    saved["global_batches"].count()
    num_lanes = saved["num_lanes"].count(low=1)
    for lane, lists in saved["lanes"].mapping().items():
        lists.holding(int(lane) if str(lane).isdigit() else lane).count(high=num_lanes - 1)
        lists.alike(to_lists((SourceState(),) * num_sources))


class PositionKeeper:
    """Follow which batches were trained on; a step that was begun but not taken does not count."""

    def __init__(self) -> None:
        self._now = self._step_start = StreamPosition(0, {})
        self._step: int | None = None  # optimizer steps taken when the latest batch was handed over

    def latest(self) -> StreamPosition:
        """Return the position behind the latest batch that was handed over, where an iteration goes on."""
        return self._now

    def hand_over(self, lane: int, state: LaneState, *, step: int) -> None:
        """Note that a batch of `lane` is about to be trained on, after `step` optimizer steps."""
        if step != self._step:
            self._step, self._step_start = step, self._now
        self._now = StreamPosition(self._now.batches + 1, {**self._now.lanes, lane: state})

    def at_step(self, step: int) -> StreamPosition:
        """Return where the data of optimizer step `step` (the next to be taken) begins."""
        return self._step_start if step == self._step else self._now

    def state(self, step: int, *, share: RankShare) -> dict[str, Any]:
        """`at_step` of all ranks as plain values; all of them must ask together."""
        position = self.at_step(step)
        lanes = _own_lanes(position, share)
        if share.num_replicas > 1:
            gathered: list[Any] = [None] * torch.distributed.get_world_size()  # tensor-parallel ranks say the same
            torch.distributed.all_gather_object(gathered, lanes)
            lanes = {lane: state for part in gathered for lane, state in part.items()}
        return {
            "global_batches": position.batches * share.num_replicas,
            "lanes": {str(lane): to_lists(lanes[lane]) for lane in sorted(lanes)},
        }

    def restore(self, state: Mapping[str, Any], *, share: RankShare) -> None:
        """Go on from what `state` gave, on any number of ranks."""
        lanes = {int(lane): from_lists(lists) for lane, lists in state["lanes"].items()}
        self._now = self._step_start = StreamPosition(state["global_batches"] // share.num_replicas, lanes)

    def statistics(self, source_names: Sequence[str], *, share: RankShare) -> dict[str, SourceStatistics]:
        """Return what each source gave to the lanes of this rank; names in the order of the lanes' figures."""
        own = _own_lanes(self._now, share).values()
        given = [[SourceState().given, *(state[index].given for state in own)] for index in range(len(source_names))]
        totals = [SourceStatistics(*map(sum, zip(*of_source, strict=True))) for of_source in given]
        return {
            name: total._replace(epochs=total.epochs / max(1, len(own)))
            for name, total in zip(source_names, totals, strict=True)
        }


def _own_lanes(position: StreamPosition, share: RankShare) -> dict[int, LaneState]:
    """Return the states of the lanes that this rank reads; those of others are as old as the checkpoint."""
    return {lane: state for lane, state in position.lanes.items() if lane % share.num_replicas == share.rank}


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
        self, sources: Sequence[tuple[Source, Reader]], *, encode: Encoder, settings: StreamSettings, share: RankShare
    ) -> None:
        self._sources, self._encode, self._settings, self._share = sources, encode, settings, share
        self.position = StreamPosition(0, {})

    def __iter__(self) -> Iterator[Any]:
        """Yield batches, each with its lane's index and state; or the error that ended a source."""
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        lanes: dict[int, Lane] = {}
        logged: list[set[BadRecord]] = [set() for _ in self._sources]
        k = self.position.batches + worker
        while True:
            lane = (k * self._share.num_replicas + self._share.rank) % self._settings.num_lanes
            if lane not in lanes:
                lanes[lane] = Lane(
                    self._sources,
                    lane=lane,
                    encode=self._encode,
                    settings=self._settings,
                    state=self.position.lanes.get(lane, (SourceState(),) * len(self._sources)),
                    logged=logged,
                )
            try:
                batch = stack([lanes[lane].next_row() for _ in range(self._settings.batch_size)])
            except DataError as error:  # a worker's exception would arrive as a traceback in a string
                yield error
                return
            yield batch | {STATE_KEY: (lane, lanes[lane].state)}
            k += workers


def stack(rows: Sequence[tuple[int, Row]]) -> dict[str, Any]:
    """Make a batch of rows and their sources: `input_ids`, `labels`, `position_ids` [B, S] and `source` [B], int64."""
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
