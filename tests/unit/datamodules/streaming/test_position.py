"""What counts as trained on, step by step, and how it is told to a checkpoint and taken from one."""

import json
from typing import Any

import pytest
import torch

from app.errors import CheckpointError
from datamodules.loading.rank_share import RankShare
from datamodules.streaming.loader import PositionKeeper, StreamPosition, check_position
from datamodules.streaming.stream import LaneState, SourceState, from_lists, to_lists

ALONE = RankShare()


def lane_state(tokens: int) -> LaneState:
    """A state that can be told from others."""
    given = SourceState().given._replace(tokens=tokens, epochs=0.5)
    return SourceState(given=given), SourceState()


def test_a_new_keeper_is_at_the_beginning() -> None:
    keeper = PositionKeeper()
    assert keeper.latest() == keeper.at_step(0) == keeper.at_step(7) == StreamPosition(0, {})
    assert keeper.state(0, share=ALONE) == {"global_batches": 0, "lanes": {}}


def test_a_step_begins_where_its_first_micro_batch_did() -> None:
    keeper, positions = PositionKeeper(), []
    for batch in range(6):  # three micro-batches a step
        positions.append(keeper.latest())
        keeper.hand_over(batch % 2, lane_state(batch + 1), step=batch // 3)
        assert keeper.latest().batches == batch + 1
        assert keeper.latest().lanes[batch % 2] == lane_state(batch + 1)
        assert keeper.at_step(batch // 3) == positions[3 * (batch // 3)]  # begun, not taken: it comes again
        assert keeper.at_step(batch // 3 + 1) == keeper.latest()  # taken
    assert keeper.latest().lanes == {0: lane_state(5), 1: lane_state(6)}
    assert keeper.at_step(1).lanes == {0: lane_state(3), 1: lane_state(2)}


def test_a_saved_position_is_restored_on_any_number_of_ranks() -> None:
    keeper = PositionKeeper()
    for batch in range(4):
        keeper.hand_over(3 - batch, lane_state(batch), step=batch)
    state = json.loads(json.dumps(keeper.state(4, share=ALONE)))
    assert state["global_batches"] == 4
    assert list(state["lanes"]) == ["0", "1", "2", "3"]
    for ranks in (1, 2, 4):
        again = PositionKeeper()
        again.hand_over(0, lane_state(99), step=0)
        again.restore(state, share=RankShare(rank=0, num_replicas=ranks))
        assert again.latest() == StreamPosition(4 // ranks, keeper.latest().lanes)
        assert again.at_step(0) == again.at_step(4) == again.latest()
        again.hand_over(1, lane_state(100), step=0)  # step 0 was begun before the restore, too: it begins anew
        assert again.at_step(0).batches == 4 // ranks


@pytest.mark.parametrize("rank", [0, 1])
def test_each_lane_is_told_by_the_rank_that_reads_it(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    told: list[Any] = []

    def gather(gathered: list[Any], own: Any) -> None:
        told.append(own)
        gathered[:] = [{0: lane_state(10), 2: lane_state(12)}, {1: lane_state(11)}]

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    keeper, share = PositionKeeper(), RankShare(rank=rank, num_replicas=2)
    everything = {"lanes": {str(number): to_lists(lane_state(number)) for number in range(4)}, "global_batches": 6}
    keeper.restore(everything, share=share)  # the other rank's lanes are known from the checkpoint, and go stale
    keeper.hand_over(rank, lane_state(50), step=0)
    state = keeper.state(1, share=share)
    assert told == [{rank: lane_state(50), rank + 2: lane_state(rank + 2)}]
    assert state["global_batches"] == 2 * (3 + 1)
    assert {number: from_lists(plain)[0].given.tokens for number, plain in state["lanes"].items()} == {
        "0": 10,
        "1": 11,
        "2": 12,
    }


@pytest.mark.parametrize("junk", ["x", -1, None, [1]])
def test_a_state_that_is_no_position_is_refused_by_name(junk):
    lane = to_lists((SourceState(), SourceState()))
    check_position({"global_batches": 3, "num_lanes": 1, "lanes": {"0": lane}}, num_sources=2)
    lane[0][1][9] = junk
    with pytest.raises(CheckpointError, match=r"data\.lanes\.0\.0\.1\.9: got"):
        check_position({"global_batches": 3, "num_lanes": 1, "lanes": {"0": lane}}, num_sources=2)
