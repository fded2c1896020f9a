"""Lanes against what their sources hold: shares, epochs, isolation of lanes, and going on from any position."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import DataError
from datamodules.readers.records import EMPTY, BadRecord, Document, LostRecords, Record
from datamodules.readers.sources import Source
from datamodules.streaming import stream as lane_stream
from datamodules.streaming.packing import Row
from datamodules.streaming.source_blocks import SourcePosition
from datamodules.streaming.stream import Lane, LaneState, SourceState, from_lists, to_lists
from tests.unit.datamodules.list_reader import SEQ_LEN, ListReader, chunks, encode, make_settings


def make_lane(
    *readers: ListReader,
    lane: int = 0,
    weights: Sequence[float] = (),
    state: LaneState | None = None,
    encode: Any = encode,
    **changes: Any,
) -> Lane:
    weights = weights or [1.0] * len(readers)
    sources = [
        (Source(kind="files", path=".", name=f"source{index}", weight=weight), reader)
        for index, (reader, weight) in enumerate(zip(readers, weights, strict=True))
    ]
    state = state or (SourceState(),) * len(readers)
    return Lane(sources, lane=lane, encode=encode, settings=make_settings(**changes), state=state)


def take(lane: Lane, count: int) -> list[tuple[int, Row]]:
    return [lane.next_row() for _ in range(count)]


def plain(rows: Sequence[tuple[int, Row]]) -> list[Any]:
    return [(source, row.input_ids.tolist(), row.labels.tolist(), row.position_ids.tolist()) for source, row in rows]


def characters(rows: Sequence[tuple[int, Row]]) -> Counter[int]:
    ids = np.concatenate([row.input_ids[: row.num_tokens] for _, row in rows])
    return Counter(ids[ids > 0].tolist())


@pytest.mark.parametrize("num_lanes", [1, 2, 3, 8])
def test_lanes_share_every_epoch_without_loss_or_repetition(num_lanes: int) -> None:
    texts, epochs = chunks(3, 1, 0, 4, 2, 6, 1, length=7), 3
    read: dict[int, tuple[int, int]] = {}
    for number in range(num_lanes):
        reader, turns = ListReader(texts), range(number, epochs * 7, num_lanes)
        lane = make_lane(reader, lane=number, num_lanes=num_lanes)
        while len(reader.opened) < len(turns):
            lane.next_row()
        read |= dict(zip(turns, reader.opened, strict=False))
    orders = [[read[7 * epoch + turn] for turn in range(7)] for epoch in range(epochs)]
    assert all(sorted(order) == [(chunk, 0) for chunk in range(7)] for order in orders)
    assert len({tuple(order) for order in orders}) == epochs


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_an_epoch_has_every_document_once_and_the_next_has_another_order(packing: str) -> None:
    texts = chunks(3, 1, 0, 4, 2, 6, length=7)
    lane = make_lane(ListReader(texts), packing=packing)
    first, second = ([row.input_ids[0] for _, row in take(lane, 16)] for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(ord(text[0]) for chunk in texts for text in chunk if text)
    assert first != second
    assert first != sorted(first)
    assert 1 <= lane.state[0].given.epochs <= 2


def test_documents_of_a_block_are_shuffled_and_without_a_buffer_they_are_not() -> None:
    texts = chunks(30, length=7)
    in_order = sorted(ord(text[0]) for text in texts[0] if text)
    unshuffled = [row.input_ids[0] for _, row in take(make_lane(ListReader(texts), shuffle_megabytes=0.0), 30)]
    shuffled = [row.input_ids[0] for _, row in take(make_lane(ListReader(texts), shuffle_megabytes=1.0), 30)]
    assert unshuffled == in_order
    assert shuffled != in_order
    assert sorted(shuffled) == in_order


def test_a_window_s_rows_are_shuffled_among_one_another_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_stream, "_WINDOW_TOKENS", 4 * SEQ_LEN + 1)
    texts: list[list[str | None]] = [[chr(number) + "x" * 6 for number in range(65, 95)]]  # a document a row
    in_order = make_lane(ListReader(texts), shuffle_megabytes=0.0)  # 1 block, 1 window and 1 row a document
    assert [row.input_ids[0] for _, row in take(in_order, 30)] == list(range(65, 95))
    assert in_order.state[0].position[2:] == (29, 29, 0, 0, 1, 0, 30, 0)
    one_block = make_lane(ListReader([["x" * 239]]), shuffle_megabytes=1.0)  # 30 rows of one document
    for window in range(7):
        for drawn in range(4):
            position = one_block.state[0].position
            assert (position.window, position.drawn) == (window, drawn)
            assert (position.taken, position.within) == (0, 4 * SEQ_LEN * window)
            one_block.next_row()
    assert [one_block.state[0].position.window, one_block.state[0].position.within] == [7, 28 * SEQ_LEN]
    take(one_block, 2)  # a block's last window ends with it
    assert one_block.state[0].position == SourcePosition(taken=1, window=8)


def test_rows_of_a_long_document_come_in_another_order_in_each_window_lane_and_source(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lane_stream, "_WINDOW_TOKENS", 10 * SEQ_LEN)
    text = "".join(chr(number // SEQ_LEN + 65) for number in range(20 * SEQ_LEN - 1))  # its rows are AAA.., BBB.., ...

    def windows(**where: Any) -> list[tuple[int, ...]]:
        lane = make_lane(*[ListReader([[text]])] * 2, shuffle_megabytes=1.0, **where)
        streams = [stream for stream in lane._streams for _ in range(2)]
        return [tuple(int(stream.next_row().input_ids[0]) - 65 for _ in range(10)) for stream in streams]

    one, other = windows(num_lanes=2), windows(num_lanes=2, lane=1)
    assert [sorted(window) for window in one] == [list(range(10)), list(range(10, 20))] * 2
    orders = [tuple(number % 10 for number in window) for window in one + other]
    assert len(set(orders)) == len(orders)


def test_without_a_buffer_the_rows_of_a_long_document_keep_their_order() -> None:
    text = "".join(chr(number // SEQ_LEN + 65) for number in range(20 * SEQ_LEN - 1))
    rows = take(make_lane(ListReader([[text]]), shuffle_megabytes=0.0), 20)
    assert [row.input_ids[0] for _, row in rows] == list(range(65, 85))


def test_the_smallest_window_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_stream, "_WINDOW_TOKENS", SEQ_LEN - 1)
    lane = make_lane(ListReader([["a" * 8 + "b" * 8 + "c" * 7]]), shuffle_megabytes=1.0)
    assert [row.input_ids[0] for _, row in take(lane, 6)] == [*map(ord, "abcabc")]
    assert lane.state[0].position.window == 6


def test_a_window_keeps_to_the_block_it_begins_in() -> None:
    lane = make_lane(ListReader(chunks(4, length=7)), shuffle_megabytes=14e-6)  # 2 documents a block, 1 row each
    windows = []
    for _ in range(8):
        windows.append(lane.state[0].position.window)
        lane.next_row()
    assert windows == [0, 0, 1, 1, 2, 2, 3, 3]


def test_epochs_are_told_as_far_as_rows_were_given_and_records_as_far_as_they_were_read() -> None:
    lane = make_lane(ListReader([["a" * 7, None], ["b" * 7] * 3]), shuffle_megabytes=0.0)  # a block a document
    assert lane.state == (SourceState(),)
    passed = []
    for _ in range(8):
        lane.next_row()
        passed.append(lane.state[0].given.epochs)
    assert passed == sorted(passed)
    assert passed[-1] in {1.5, 2.0}  # whole chunks, but for the last one's end
    assert lane.state[0].given[3:] in {(10, 2), (9, 1)}  # seen, skipped
    whole = make_lane(ListReader([["a" * 15, "b" * 15]] * 2), shuffle_megabytes=1.0)  # an epoch a block, of 8 rows
    monitored = [whole.state[0].given.epochs]
    for _ in range(8):
        whole.next_row()
        monitored.append(whole.state[0].given.epochs)
    assert monitored == [count / 8 for count in range(9)]


def test_texts_are_tokenised_a_few_at_a_time() -> None:
    calls: list[int] = []

    def counting(texts: Sequence[str]) -> list[Any]:
        calls.append(len(texts))
        return encode(texts)

    lane = make_lane(ListReader(chunks(150, length=7)), shuffle_megabytes=1.0, encode=counting)
    take(lane, 150)
    assert calls == [64, 64, 22]


@settings(max_examples=40)
@given(data=st.data())
def test_a_lane_goes_on_from_any_position_as_if_it_had_not_stopped(data: st.DataObject) -> None:
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
    window = data.draw(st.sampled_from([1, 3, 1000]))
    with patch.object(lane_stream, "_WINDOW_TOKENS", window * SEQ_LEN):
        whole = make_lane(ListReader(texts), ListReader(other), **changes)
        take(whole, before)
        state = from_lists(to_lists(whole.state))
        assert state == whole.state
        expected = take(whole, 25)
        resumed = make_lane(ListReader(texts), ListReader(other), state=state, **changes)
        assert plain(take(resumed, 25)) == plain(expected)
        assert resumed.state == whole.state


def test_a_new_lane_is_at_the_start() -> None:
    assert make_lane(ListReader(chunks(3)), ListReader(chunks(3))).state == (SourceState(), SourceState())


def test_another_position_is_another_stream() -> None:
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
    assert [source.given.tokens for source in lane.state] == list(tokens)
    assert sum(source.given.rows for source in lane.state) == 400


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
    assert lane.state[0].position.skipped == pytest.approx(lane.state[0].position.seen * 0.4, abs=2)
    why = r"'source0': 2 of 5 records are bad, more than max_bad_share 0.3[^$]*: bad \(and 1 more\)"
    with pytest.raises(DataError, match=why):
        take(make_lane(ListReader(texts), max_bad_share=0.3), 6)


def test_a_bad_shard_is_no_bad_corpus_but_a_bad_corpus_is_found_early() -> None:
    """40 chunks, one or half of them bad: judged by chunks until everything was seen."""
    good = chunks(*[40] * 40, length=7)
    for seed in range(6):
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
    assert lane.state[0].given.skipped == lane.state[0].given.seen / 2
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
