"""Which lane a batch comes from, what it brings along, and what the loader does not do until it must."""

from collections.abc import Iterator
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from app.errors import DataError
from datamodules.loading.rank_share import RankShare
from datamodules.loading.workers import prepare_worker
from datamodules.readers.sources import Source
from datamodules.streaming import loader as stream_loader
from datamodules.streaming.loader import STATE_KEY, LaneBatches, StreamLoader, StreamPosition, stack
from datamodules.streaming.packing import Row
from datamodules.streaming.stream import Lane, SourceState
from tests.unit.datamodules.list_reader import ListReader, chunks, encode, make_settings


def make_batches(
    reader: ListReader | None = None, *, rank: int = 0, num_replicas: int = 1, batch_size: int = 2, **changes: Any
) -> LaneBatches:
    sources = [(Source(kind="files", path=".", name="letters"), reader or ListReader(chunks(5, 6, 7)))]
    share, settings = RankShare(rank=rank, num_replicas=num_replicas), make_settings(batch_size=batch_size, **changes)
    return LaneBatches(sources, encode=encode, settings=settings, share=share)  # type: ignore[arg-type]


def lane_numbers(batches: LaneBatches, count: int) -> list[int]:
    return [batch[STATE_KEY][0] for batch in islice(batches, count)]


@pytest.mark.parametrize(("num_replicas", "workers"), [(1, 1), (2, 1), (1, 2), (2, 2), (2, 4), (4, 1)])
def test_the_lane_of_a_micro_batch_is_its_number_in_the_world(
    monkeypatch: pytest.MonkeyPatch, num_replicas: int, workers: int
) -> None:
    """Whatever ranks and workers there are, micro-batch n of the world is of lane n mod V."""
    for first in (0, 3):
        found: dict[int, int] = {}
        for rank in range(num_replicas):
            for worker in range(workers):
                info = SimpleNamespace(id=worker, num_workers=workers)
                monkeypatch.setattr(stream_loader, "get_worker_info", lambda info=info: info)
                batches = make_batches(rank=rank, num_replicas=num_replicas, num_lanes=8)
                batches.position = StreamPosition(first, {})
                for turn, lane in enumerate(lane_numbers(batches, 6)):
                    found[(first + worker + turn * workers) * num_replicas + rank] = lane
        assert found == {number: number % 8 for number in found}
        assert min(found) == first * num_replicas


def test_each_batch_brings_the_state_behind_it_and_one_can_go_on_from_there() -> None:
    batches = list(islice(make_batches(num_lanes=2), 9))
    for at in (1, 2, 5):
        position = StreamPosition(at, dict(batch[STATE_KEY] for batch in batches[:at]))
        again = make_batches(num_lanes=2)
        again.position = position
        for batch, expected in zip(islice(again, 4), batches[at:], strict=False):
            assert torch.equal(batch["input_ids"], expected["input_ids"])
            assert batch[STATE_KEY] == expected[STATE_KEY]
    assert not torch.equal(batches[0]["input_ids"], batches[2]["input_ids"])
    assert batches[2][STATE_KEY][1][0].given.rows == 4


def test_a_bad_record_that_every_lane_meets_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "datamodules")
    reader = ListReader([*chunks(2, 2, 2, 2, 2, 2, 2), [None]])
    batches = list(islice(make_batches(reader, num_lanes=4), 60))
    assert sum(state[0].given.skipped > 0 for state in dict(batch[STATE_KEY] for batch in batches).values()) > 1
    assert [record.getMessage() for record in caplog.records] == ["source 'letters': skipped 7:0: bad"]


def test_a_batch_has_the_rows_a_lane_gives() -> None:
    sources = [(Source(kind="files", path=".", name="letters"), ListReader(chunks(5, 6, 7)))]
    settings = make_settings()
    lane = Lane(sources, lane=0, encode=encode, settings=settings, state=(SourceState(),))  # type: ignore[arg-type]
    rows = [lane.next_row() for _ in range(6)]
    batches = list(islice(make_batches(batch_size=3), 2))
    assert [row for batch in batches for row in batch["input_ids"].tolist()] == [
        row.input_ids.tolist() for _, row in rows
    ]


def test_stacking_keeps_rows_and_sources_apart() -> None:
    rows = [
        (source, Row(*(np.arange(3, dtype=np.int32) + 10 * part + source for part in range(3)), 3)) for source in (4, 7)
    ]
    batch = stack(rows)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[4, 5, 6], [7, 8, 9]],
        "labels": [[14, 15, 16], [17, 18, 19]],
        "position_ids": [[24, 25, 26], [27, 28, 29]],
        "source": [4, 7],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_nothing_is_asked_or_read_before_the_first_batch_is_wanted() -> None:
    reader, asked = ListReader(chunks(5)), []

    def position() -> StreamPosition:
        asked.append(len(reader.opened))
        return StreamPosition(1, {})

    loader = StreamLoader(make_batches(reader, num_lanes=2), position=position, num_workers=0, seed=0)
    iterator = iter(loader)
    assert (asked, reader.opened) == ([], [])
    assert next(iterator)[STATE_KEY][0] == 1  # where the position says
    assert asked == [0]
    next(iter(loader))
    assert len(asked) == 2  # at every iteration


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_error_that_ends_a_source_is_raised_behind_the_batches_before_it(num_workers: int) -> None:
    class Ending(ListReader):
        def read(self, chunk: int, *, start: int = 0) -> Iterator[Any]:
            if self.opened:
                raise DataError("source 'letters': the end\n  with an example")
            return super().read(chunk, start=start)

    batches = make_batches(Ending(chunks(4, length=7)), shuffle_megabytes=1.0)
    loader = StreamLoader(batches, position=lambda: StreamPosition(0, {}), num_workers=num_workers, seed=0)
    iterator = iter(loader)
    assert [next(iterator)["source"].tolist() for _ in range(2)] == [[0, 0]] * 2
    with pytest.raises(DataError) as caught:
        next(iterator)
    assert str(caught.value) == "source 'letters': the end\n  with an example"


def test_lightning_finds_a_loader_that_can_stop_anywhere_and_has_no_state() -> None:
    loader = StreamLoader(make_batches(), position=lambda: StreamPosition(0, {}), num_workers=0, seed=0)
    assert loader.state_dict() == {}
    loader.load_state_dict({})
    assert loader.batch_size is None  # batches come whole


def test_workers_draw_from_a_generator_of_their_own() -> None:
    loader = StreamLoader(make_batches(), position=lambda: StreamPosition(0, {}), num_workers=1, seed=5)
    assert loader.num_workers == 1
    assert loader.generator.initial_seed() == 5
    state = torch.get_rng_state()
    next(iter(loader))
    assert torch.equal(torch.get_rng_state(), state)
    assert loader.worker_init_fn is prepare_worker
