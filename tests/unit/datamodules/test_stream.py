"""Lanes against what their sources hold: shares, epochs, isolation of lanes, and going on from any place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import DataError
from datamodules.packing import Row, Tokens
from datamodules.readers.records import EMPTY, BadRecord, LostRecords, Record
from datamodules.sources import Document, Source
from datamodules.stream import Lane, LaneState, StreamSettings

SEQ_LEN = 8


class ListReader:
    """Chunks given as lists of texts; None is a bad record."""

    fingerprint = "lists"

    def __init__(self, chunks: Sequence[Sequence[str | None]]) -> None:
        self._chunks, self.num_chunks = chunks, len(chunks)
        self.opened: list[tuple[int, int]] = []

    def read(self, chunk: int, *, start: int = 0) -> Iterator[Record]:
        self.opened.append((chunk, start))
        for index, text in enumerate(self._chunks[chunk][start:], start):
            place = f"{chunk}:{index}"
            yield BadRecord(place, "bad") if text is None else Document(place, text, origin=text)


def chunks(*sizes: int, length: int = 5, first: int = 1) -> list[list[str | None]]:
    """Documents of `length` equal characters; each its own character."""
    numbers = iter(range(first, 10_000))
    return [[chr(next(numbers)) * length for _ in range(size)] for size in sizes]


def encode(texts: Sequence[str]) -> list[Tokens]:
    return [np.array([*map(ord, text), 0], dtype=np.int32) for text in texts]


def make_settings(**changes: Any) -> StreamSettings:
    defaults: dict[str, Any] = {
        "seq_len": SEQ_LEN,
        "packing": "split",
        "long_documents": "split",
        "shuffle_megabytes": 40e-6,
        "validation_share": 0.0,
        "max_bad_share": 0.5,
        "seed": 3,
        "num_lanes": 1,
    }
    return StreamSettings(**(defaults | changes))


def make_lane(
    *readers: ListReader, lane: int = 0, weights: Sequence[float] = (), state: LaneState | None = None, **changes: Any
) -> Lane:
    weights = weights or [1.0] * len(readers)
    sources = [
        (Source(kind="files", path=".", name=f"source{index}", weight=weight), reader)
        for index, (reader, weight) in enumerate(zip(readers, weights, strict=True))
    ]
    state = state or LaneState.start(len(readers))
    return Lane(sources, lane=lane, encode=encode, settings=make_settings(**changes), state=state)  # type: ignore[arg-type]


def take(lane: Lane, count: int) -> list[tuple[int, Row]]:
    return [lane.next_row() for _ in range(count)]


def plain(rows: Sequence[tuple[int, Row]]) -> list[Any]:
    return [(source, row.input_ids.tolist(), row.labels.tolist(), row.position_ids.tolist()) for source, row in rows]


def characters(rows: Sequence[tuple[int, Row]]) -> Counter[int]:
    ids = np.concatenate([row.input_ids[: row.num_tokens] for _, row in rows])
    return Counter(ids[ids > 0].tolist())


@pytest.mark.parametrize("num_lanes", [1, 2, 3, 8])
def test_lanes_share_every_epoch_without_loss_or_repetition(num_lanes: int) -> None:
    texts = chunks(3, 1, 0, 4, 2, 6, 1, length=7)
    lanes = [make_lane(ListReader(texts), lane=lane, num_lanes=num_lanes) for lane in range(num_lanes)]
    # documents of 8 tokens are rows of 8: the records read are the rows given
    streams = [lane._streams[0] for lane in lanes]
    counts = Counter[str]()
    epochs = 8  # every lane has had the same number of chunks after these
    for stream, lane in zip(streams, range(num_lanes), strict=True):
        numbers = range(lane, epochs * 7, num_lanes)
        for number in numbers:
            entry = stream._chunks(number // 7)[number % 7]
            counts.update(text for text in texts[entry] if text)
    assert set(counts.values()) == {epochs}
    assert len(counts) == 17


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_an_epoch_has_every_document_once_and_the_next_has_another_order(packing: str) -> None:
    texts = chunks(3, 1, 0, 4, 2, 6, length=7)
    lane = make_lane(ListReader(texts), packing=packing)
    first, second = ([row.input_ids[0] for _, row in take(lane, 16)] for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(ord(text[0]) for chunk in texts for text in chunk if text)
    assert first != second
    assert first != sorted(first)
    assert 1 <= lane.state.epochs[0] <= 2


def test_documents_of_a_block_are_shuffled_and_without_a_buffer_they_are_not() -> None:
    texts = chunks(30, length=7)
    in_order = sorted(ord(text[0]) for text in texts[0] if text)
    unshuffled = [row.input_ids[0] for _, row in take(make_lane(ListReader(texts), shuffle_megabytes=0.0), 30)]
    shuffled = [row.input_ids[0] for _, row in take(make_lane(ListReader(texts), shuffle_megabytes=1.0), 30)]
    assert unshuffled == in_order
    assert shuffled != in_order
    assert sorted(shuffled) == in_order


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_a_lane_goes_on_from_any_place_as_if_it_had_not_stopped(data: st.DataObject) -> None:
    """Mid-document, mid-block, mid-chunk, second epoch; with bad records, several sources, both packings."""
    sizes = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any))
    texts = chunks(*sizes, length=data.draw(st.integers(1, 30)))
    for chunk in texts:
        if chunk and data.draw(st.booleans()):
            chunk.insert(data.draw(st.integers(0, len(chunk))), None)
    other = chunks(2, 9, length=3, first=500)
    changes = {
        "packing": data.draw(st.sampled_from(["split", "best_fit"])),
        "long_documents": data.draw(st.sampled_from(["split", "truncate"])),
        "shuffle_megabytes": data.draw(st.sampled_from([0.0, 10e-6, 40e-6, 1.0])),
        "num_lanes": data.draw(st.integers(1, 3)),
        "max_bad_share": 1.0,
        "weights": (1.0, 2.5),
    }
    changes["lane"] = data.draw(st.integers(0, changes["num_lanes"] - 1))
    before = data.draw(st.integers(0, 60))
    whole = make_lane(ListReader(texts), ListReader(other), **changes)
    take(whole, before)
    state = LaneState.of(whole.state.plain())
    assert state == whole.state
    expected = take(whole, 25)
    resumed = make_lane(ListReader(texts), ListReader(other), state=state, **changes)
    assert plain(take(resumed, 25)) == plain(expected)
    assert resumed.state == whole.state


def test_another_place_is_another_stream() -> None:
    lane = make_lane(ListReader(chunks(9, 9)))
    rows = plain(take(lane, 6))
    assert plain(take(make_lane(ListReader(chunks(9, 9)), state=lane.state), 6)) != rows
    assert plain(take(make_lane(ListReader(chunks(9, 9)), seed=4), 6)) != rows


def test_resuming_reads_one_block_again_and_not_the_epoch() -> None:
    texts = chunks(*[5] * 40)
    lane = make_lane(ListReader(texts), shuffle_megabytes=25e-6)
    take(lane, 100)
    reader = ListReader(texts)
    take(make_lane(reader, shuffle_megabytes=25e-6, state=lane.state), 1)
    assert len(reader.opened) <= 3


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_weights_are_shares_of_tokens_at_any_time(packing: str) -> None:
    short, long = ListReader(chunks(50, 50, length=2)), ListReader(chunks(20, 30, length=40))
    lane = make_lane(short, long, weights=(1.0, 3.0), packing=packing)
    tokens = [0, 0]
    for source, row in take(lane, 400):
        tokens[source] += row.num_tokens
        assert abs(tokens[0] * 3.0 - tokens[1]) <= 8 * SEQ_LEN
    assert lane.state.tokens == tuple(tokens)
    assert sum(lane.state.rows) == 400


def test_lanes_do_not_take_the_same_source_at_the_same_time() -> None:
    firsts = {make_lane(*[ListReader(chunks(9))] * 2, lane=lane, num_lanes=16).next_row()[0] for lane in range(16)}
    assert firsts == {0, 1}


def test_held_out_documents_are_left_out() -> None:
    texts = chunks(20, 20, length=7)
    kept = {
        text for chunk in texts for text in chunk if text and not Document("", text, origin=text).is_held_out(share=0.5)
    }
    assert 5 < len(kept) < 35
    rows = take(make_lane(ListReader(texts), validation_share=0.5), 2 * len(kept))
    assert {chr(character) * 7 for character in characters(rows)} == kept


def test_a_truncated_document_ends_with_its_row() -> None:
    rows = take(make_lane(ListReader(chunks(4, length=20)), long_documents="truncate"), 4)
    assert all(len(set(row.input_ids)) == 1 for _, row in rows)
    assert all(row.labels[-1] == -100 for _, row in rows)


def test_bad_records_are_skipped_counted_and_too_many_stop_the_stream() -> None:
    texts: list[list[str | None]] = [["a" * 7, None], ["b" * 7], [None, "c" * 7]]
    lane = make_lane(ListReader(texts), max_bad_share=0.5)
    assert {chr(row.input_ids[0]) for _, row in take(lane, 6)} == {"a", "b", "c"}
    assert lane.state.places[0].skipped == pytest.approx(lane.state.places[0].seen * 0.4, abs=2)
    why = r"'source0': 2 of 5 records are bad, more than max_bad_share 0.3[^$]*: bad \(and 1 more\)"
    with pytest.raises(DataError, match=why):
        take(make_lane(ListReader(texts), max_bad_share=0.3), 6)


def test_a_bad_shard_is_no_bad_corpus_but_a_bad_corpus_is_found_early() -> None:
    """40 chunks, one or half of them bad: judged by chunks until everything was seen."""
    good = chunks(*[40] * 40, length=7)
    for seed in range(20):
        one: list[list[str | None]] = [[None] * 40, *good[1:]]
        take(make_lane(ListReader(one), max_bad_share=0.05, seed=seed), 1500)  # nearly an epoch
        half: list[list[str | None]] = [*[[None] * 40] * 20, *good[20:]]
        with pytest.raises(DataError, match=r"more than max_bad_share 0\.05"):
            take(make_lane(ListReader(half), max_bad_share=0.05, seed=seed), 1000)


def test_empty_records_are_counted_but_not_held_against_a_source() -> None:
    class Empties(ListReader):
        def read(self, chunk: int, *, start: int = 0) -> Iterator[Record]:
            return (
                item._replace(reason=EMPTY) if isinstance(item, BadRecord) else item
                for item in super().read(chunk, start=start)
            )

    texts: list[list[str | None]] = [["a" * 7, None], ["b" * 7, None]]
    lane = make_lane(Empties(texts), max_bad_share=0.0)
    take(lane, 8)
    assert lane.state.skipped[0] == lane.state.seen[0] / 2
    with pytest.raises(DataError):
        take(make_lane(ListReader(texts), max_bad_share=0.0), 8)


def test_a_lost_file_counts_as_what_it_held() -> None:
    class Lossy(ListReader):
        def read(self, chunk: int, *, start: int = 0) -> Iterator[Record]:
            return super().read(chunk, start=start) if chunk % 2 else iter([LostRecords(f"{chunk}", "gone")])

    with pytest.raises(DataError, match=r"more than max_bad_share 0\.2"):
        take(make_lane(Lossy(chunks(*[30] * 60, length=7)), max_bad_share=0.2), 900)


def test_a_source_that_ends_up_empty_is_named() -> None:
    full = ListReader(chunks(9))
    with pytest.raises(DataError, match="'source1': no usable training document"):
        take(make_lane(full, ListReader([[], []])), 3)
    with pytest.raises(DataError, match="'source1': no usable training document"):
        take(make_lane(full, ListReader([[None]]), max_bad_share=1.0), 3)


def test_a_file_that_vanishes_is_missed_and_the_rest_goes_on() -> None:
    texts = chunks(3, 3, length=7)
    lane = make_lane(ListReader(texts))
    take(lane, 2)
    texts[0][:], texts[1][:] = [None], texts[1]
    assert len(list(islice(iter(lane.next_row, None), 20))) == 20
