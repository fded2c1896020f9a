"""Where the stream stands: what was trained on, of all lanes of all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from app.checkpoints.entries import SavedEntries
from datamodules.loading.rank_share import RankShare
from datamodules.streaming.stream import LaneState


@dataclass(frozen=True)
class StreamPosition:
    """Where the stream of the whole world stands.

    Attributes:
        batches: Micro-batches that every rank trained on.
        lanes: State of each lane that delivered something.
    """

    batches: int
    lanes: Mapping[int, LaneState]


def check_position(state: Mapping[str, Any], *, num_sources: int) -> None:
    """Refuse a saved place of the stream that none can be.

    Raises:
        CheckpointError: Naming the entry.
    """
    saved, entry = SavedEntries(), ("data",)
    saved.count((*entry, "global_batches"), state.get("global_batches"))
    num_lanes = saved.count((*entry, "num_lanes"), state.get("num_lanes"), low=1)
    for number, lane in saved.any_keys((*entry, "lanes"), state.get("lanes")).items():
        saved.count((*entry, "lanes", number), int(number) if str(number).isdigit() else number, high=num_lanes - 1)
        saved.alike((*entry, "lanes", number), lane, LaneState.start(num_sources).plain())


class PositionKeeper:
    """Follows which batches were trained on; a step that was begun but not taken does not count."""

    def __init__(self) -> None:
        self._now = self._step_start = StreamPosition(0, {})
        self._step: int | None = None  # optimizer steps taken when the latest batch was handed over

    def latest(self) -> StreamPosition:
        """Behind the latest batch that was handed over: where an iteration goes on."""
        return self._now

    def hand_over(self, number: int, state: LaneState, *, step: int) -> None:
        """A batch of lane `number` is about to be trained on, `step` optimizer steps having been taken."""
        if step != self._step:
            self._step, self._step_start = step, self._now
        self._now = StreamPosition(self._now.batches + 1, {**self._now.lanes, number: state})

    def at_step(self, step: int) -> StreamPosition:
        """Where the data of optimizer step `step` (the next to be taken) begins."""
        return self._step_start if step == self._step else self._now

    def state(self, step: int, *, share: RankShare) -> dict[str, Any]:
        """`at_step` as plain values, of all ranks; all of them must ask together."""
        position = self.at_step(step)
        lanes = _from_all_ranks(dict(position.lanes), share=share)
        return {
            "global_batches": position.batches * share.num_replicas,
            "lanes": {str(number): state.plain() for number, state in sorted(lanes.items())},
        }

    def restore(self, state: Mapping[str, Any], *, share: RankShare) -> None:
        """Go on from what `state` gave, on any number of ranks."""
        lanes = {int(number): LaneState.of(plain) for number, plain in state["lanes"].items()}
        self._now = self._step_start = StreamPosition(state["global_batches"] // share.num_replicas, lanes)


def _from_all_ranks(lanes: dict[int, LaneState], *, share: RankShare) -> dict[int, LaneState]:
    """Each lane's state from the rank that reads it."""
    own = {number: state for number, state in lanes.items() if number % share.num_replicas == share.rank}
    if share.num_replicas == 1:
        return own
    gathered: list[Any] = [None] * torch.distributed.get_world_size()  # tensor-parallel ranks say the same
    torch.distributed.all_gather_object(gathered, own)
    return {number: state for part in gathered for number, state in part.items()}
