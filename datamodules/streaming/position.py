"""Where the stream stands: what was trained on, in all lanes of all ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from app.checkpoints.entries import SavedEntries
from app.protocols import SourceStatistics
from datamodules.loading.rank_share import RankShare
from datamodules.streaming.stream import LaneState


@dataclass(frozen=True)
class StreamPosition:
    """The micro-batches that every rank trained on, and the state of each lane that delivered some, by its number."""

    batches: int
    lanes: Mapping[int, LaneState]


def check_position(state: Mapping[str, Any], *, num_sources: int) -> None:
    """Raise CheckpointError, naming the entry, if a saved state is no position of a stream."""
    saved, entry = SavedEntries(), ("data",)
    saved.count((*entry, "global_batches"), state.get("global_batches"))
    num_lanes = saved.count((*entry, "num_lanes"), state.get("num_lanes"), low=1)
    for number, lane in saved.any_keys((*entry, "lanes"), state.get("lanes")).items():
        saved.count((*entry, "lanes", number), int(number) if str(number).isdigit() else number, high=num_lanes - 1)
        saved.alike((*entry, "lanes", number), lane, LaneState.start(num_sources).to_lists())


class PositionKeeper:
    """Follows which batches were trained on; a step that was begun but not taken does not count."""

    def __init__(self) -> None:
        self._now = self._step_start = StreamPosition(0, {})
        self._step: int | None = None  # optimizer steps taken when the latest batch was handed over

    def latest(self) -> StreamPosition:
        """The position behind the latest batch that was handed over, where an iteration goes on."""
        return self._now

    def hand_over(self, number: int, state: LaneState, *, step: int) -> None:
        """Note that a batch of lane `number` is about to be trained on, after `step` optimizer steps."""
        if step != self._step:
            self._step, self._step_start = step, self._now
        self._now = StreamPosition(self._now.batches + 1, {**self._now.lanes, number: state})

    def at_step(self, step: int) -> StreamPosition:
        """Where the data of optimizer step `step` (the next to be taken) begins."""
        return self._step_start if step == self._step else self._now

    def state(self, step: int, *, share: RankShare) -> dict[str, Any]:
        """`at_step` of all ranks as plain values; all of them must ask together."""
        position = self.at_step(step)
        lanes = _own_lanes(position, share)
        if share.num_replicas > 1:
            gathered: list[Any] = [None] * torch.distributed.get_world_size()  # tensor-parallel ranks say the same
            torch.distributed.all_gather_object(gathered, lanes)
            lanes = {number: state for part in gathered for number, state in part.items()}
        return {
            "global_batches": position.batches * share.num_replicas,
            "lanes": {str(number): state.to_lists() for number, state in sorted(lanes.items())},
        }

    def restore(self, state: Mapping[str, Any], *, share: RankShare) -> None:
        """Go on from what `state` gave, on any number of ranks."""
        lanes = {int(number): LaneState.from_lists(lists) for number, lists in state["lanes"].items()}
        self._now = self._step_start = StreamPosition(state["global_batches"] // share.num_replicas, lanes)

    def statistics(self, source_names: Sequence[str], *, share: RankShare) -> dict[str, SourceStatistics]:
        """What each source gave to the lanes of this rank; names in the order of the lanes' figures."""
        own = _own_lanes(self._now, share).values()
        return {
            name: SourceStatistics(
                tokens=sum(state.tokens[index] for state in own),
                rows=sum(state.rows[index] for state in own),
                epochs=sum(state.epochs[index] for state in own) / max(1, len(own)),
                seen=sum(state.seen[index] for state in own),
                skipped=sum(state.skipped[index] for state in own),
            )
            for index, name in enumerate(source_names)
        }


def _own_lanes(position: StreamPosition, share: RankShare) -> dict[int, LaneState]:
    """The states of the lanes that this rank reads; those of others are as old as the checkpoint."""
    return {number: state for number, state in position.lanes.items() if number % share.num_replicas == share.rank}
