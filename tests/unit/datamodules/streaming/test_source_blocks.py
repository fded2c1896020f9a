"""Blocks by hand: what is in each, where it begins and ends, and how they are shuffled."""

from itertools import islice, pairwise
from typing import Any

import pytest

from app.errors import DataError
from datamodules.readers.records import EMPTY, BadRecord, LostRecords
from datamodules.streaming.bad_records import BadRecords
from datamodules.streaming.source_blocks import Block, SourceBlocks, SourcePosition
from tests.unit.datamodules.list_reader import ListReader, chunks, make_settings


def make_blocks(reader: ListReader, *, index: int = 0, lane: int = 0, **changes: Any) -> SourceBlocks:
    settings = make_settings(**changes)
    records = BadRecords("letters", max_share=settings.max_bad_share)
    return SourceBlocks(reader, index=index, lane=lane, settings=settings, records=records)


def take(reader: ListReader, count: int, *, start: SourcePosition = SourcePosition(), **changes: Any) -> list[Block]:  # noqa: B008
    return list(islice(make_blocks(reader, **changes).read(start), count))


def test_a_block_ends_when_it_is_large_enough_and_with_the_epoch() -> None:
    blocks = take(ListReader(chunks(3, 4)), 8, shuffle_megabytes=10e-6)  # documents of 5 characters
    assert [len(block.texts) for block in blocks] == [2, 2, 2, 1] * 2
    assert [block.start.block for block in blocks] == list(range(8))
    assert [block.following.seen for block in blocks] == [2, 4, 6, 7, 9, 11, 13, 14]
    assert [block.following for block in blocks[:-1]] == [block.start for block in blocks[1:]]
    for epoch in (blocks[:4], blocks[4:]):
        assert sorted(text for block in epoch for text in block.texts) == sorted(
            text for chunk in chunks(3, 4) for text in chunk if text
        )


def test_where_a_block_ends_is_told_by_chunks_and_records() -> None:
    reader = ListReader(chunks(3, 3))
    positions = [block.following[:2] for block in take(reader, 4, shuffle_megabytes=10e-6)]
    assert positions == [(0, 2), (1, 1), (1, 3), (2, 2)]  # the third has all of the epoch, but its end was not seen yet
    assert take(reader, 1, shuffle_megabytes=1.0)[0].following == SourcePosition(2, 0, 1, 6)


@pytest.mark.parametrize("at", range(1, 7))
def test_any_block_can_be_read_first(at: int) -> None:
    texts = chunks(3, 0, 4, 2)
    texts[2].insert(1, None)
    changes = {"shuffle_megabytes": 10e-6, "num_lanes": 2, "lane": 1, "max_bad_share": 1.0}
    blocks = take(ListReader(texts), 10, **changes)
    assert take(ListReader(texts), 10 - at, start=blocks[at].start, **changes) == blocks[at:]


def test_what_was_read_is_counted_up_to_each_block() -> None:
    class Empties(ListReader):
        def read(self, chunk: int, *, start: int = 0) -> Any:
            for item in super().read(chunk, start=start):
                yield item._replace(reason=EMPTY) if isinstance(item, BadRecord) and chunk == 1 else item

    texts: list[list[str | None]] = [["a", None, None], ["b", None]]
    blocks = make_blocks(Empties(texts), shuffle_megabytes=1.0, max_bad_share=0.5)
    first, second = islice(blocks.read(SourcePosition()), 2)
    assert first.following[3:6] == (5, 3, 2)  # seen, skipped, failed: empty ones are no failures
    assert second.following[3:6] == (10, 6, 4)
    assert (blocks.records.seen, blocks.records.skipped, blocks.records.failed) == (10, 6, 4)
    again = make_blocks(Empties(texts), shuffle_megabytes=1.0, max_bad_share=0.5)
    assert next(again.read(second.start)) == second
    with pytest.raises(DataError, match=r"4 of 8 records are bad, more than max_bad_share 0\.39"):
        next(make_blocks(Empties(texts), shuffle_megabytes=1.0, max_bad_share=0.39).read(second.start))


def test_a_lost_chunk_weighs_what_the_ones_before_it_had() -> None:
    class Lossy(ListReader):
        def read(self, chunk: int, *, start: int = 0) -> Any:
            opened = len(self.opened)
            yield from super().read(chunk, start=start) if opened != 3 else [LostRecords("shard", "gone")]

    blocks = make_blocks(Lossy(chunks(10, 10, 10, 10)), shuffle_megabytes=1.0, max_bad_share=0.5)
    assert next(blocks.read(SourcePosition())).following[3:6] == (40, 1, 10)


def test_no_document_behind_too_much_that_is_bad_is_given_even_in_the_same_chunk() -> None:
    class Spoilt(ListReader):
        def read(self, chunk: int, *, start: int = 0) -> Any:
            bad = [BadRecord("shard", "bad")] * (200 if len(self.opened) == 30 else 0)
            yield from (*bad, *super().read(chunk, start=start))

    blocks = make_blocks(Spoilt(chunks(*[1] * 40)), shuffle_megabytes=0.0, max_bad_share=0.05).read(SourcePosition())
    assert all(len(next(blocks).texts) == 1 for _ in range(30))
    with pytest.raises(DataError, match="200 of 231 records are bad"):
        next(blocks)


@pytest.mark.parametrize("lane", range(8))
def test_a_bad_line_longer_than_many_chunks_stops_no_lane(lane: int) -> None:
    """It begins in a chunk of its own, the good ones lie in two: a lane meets either often or never."""
    reader = ListReader([[None], *([[]] * 29), *chunks(1000, 1000, length=1)])
    blocks = make_blocks(reader, lane=lane, num_lanes=8, max_bad_share=0.01, shuffle_megabytes=100e-6)
    read = blocks.read(SourcePosition())
    while blocks.records.chunks < 3 * reader.num_chunks:
        next(read)


def test_chunks_come_in_another_order_each_epoch_and_source() -> None:
    orders = []
    for index in range(2):
        reader = ListReader(chunks(*[1] * 12))
        take(reader, 2, index=index, shuffle_megabytes=1.0)
        opened = [chunk for chunk, _ in reader.opened]
        orders += [tuple(opened[:12]), tuple(opened[12:])]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len(set(orders)) == 4


def test_documents_come_in_another_order_in_each_block_lane_and_source() -> None:
    where = [{"lane": lane, "index": index} for lane in range(2) for index in range(2)]
    orders = {tuple(block.texts) for block in take(ListReader(chunks(12)), 1, shuffle_megabytes=1.0)} | {
        tuple(block.texts)
        for source in where
        for block in take(ListReader(chunks(12)), 2, num_lanes=2, shuffle_megabytes=1.0, **source)
    }
    assert len(orders) == 8  # the first is one of the others: lane 0 of source 0, whatever the number of lanes
    other_seed = take(ListReader(chunks(12)), 1, shuffle_megabytes=1.0, seed=4)
    assert tuple(other_seed[0].texts) not in orders


def test_without_a_buffer_records_keep_their_order_in_a_chunk() -> None:
    texts = chunks(4, 4)
    blocks = take(ListReader(texts), 8, shuffle_megabytes=0.0)
    assert [len(block.texts) for block in blocks] == [1] * 8
    found = [block.texts[0] for block in blocks]
    assert found in (texts[0] + texts[1], texts[1] + texts[0])


def test_chunks_are_opened_once_an_epoch_and_as_late_as_possible() -> None:
    reader = ListReader(chunks(4, 4))
    blocks = make_blocks(reader, shuffle_megabytes=10e-6).read(SourcePosition())
    assert reader.opened == []
    opened = []
    for _ in range(4):
        next(blocks)
        opened.append(len(reader.opened))
    assert opened == [1, 1, 2, 2]


def test_a_source_without_documents_is_given_up_after_some_passes_over_it() -> None:
    reader = ListReader([[], [None], []])
    with pytest.raises(DataError, match=r"'letters': no usable training document in 2[01] records; [^$]*bad"):
        take(reader, 1, max_bad_share=1.0)
    assert 20 * 3 <= len(reader.opened) <= 21 * 3
    late = ListReader([[], ["a"]] + [[]] * 10)  # a lane that meets it seldom has patience
    assert take(late, 3, num_lanes=7)[2].texts == ["a"]


def test_epochs_are_passes_over_all_chunks_by_all_lanes() -> None:
    blocks = make_blocks(ListReader(chunks(1, 1, 1, 1)), num_lanes=2)
    assert [blocks.epochs(ordinal) for ordinal in (0, 1, 2, 5.5)] == [0.0, 0.5, 1.0, 2.75]


def test_held_out_documents_are_read_and_left_out() -> None:
    blocks = make_blocks(ListReader(chunks(20)), validation_share=0.5, shuffle_megabytes=1.0)
    block = next(blocks.read(SourcePosition()))
    assert 2 < len(block.texts) < 18
    assert block.following.seen == 20
    assert block.following.skipped == 0
    assert not any(left == right for left, right in pairwise(sorted(block.texts)))
