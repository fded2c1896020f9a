import pickle
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.errors import DataError
from datamodules.readers.records import Document, Record
from datamodules.readers.sources import Source
from datamodules.streaming.packing import Tokens
from datamodules.streaming.survey import Survey, spread_rows
from tests.unit.datamodules.corpora import write_files
from tests.unit.datamodules.list_reader import ListReader


def look(folder: Path, **changes: Any) -> Survey:
    settings: dict[str, Any] = {
        "training_bytes": 10**6,
        "held_out_bytes": 10**6,
        "validation_share": 0.3,
        "max_bad_share": 0.05,
    }
    return Survey(Source(kind="files", path=str(folder), name="code"), **(settings | changes))


def is_held_out(text: str) -> bool:
    return Document("", text, origin=text).is_held_out(share=0.3)


def test_all_of_a_small_source_is_found_each_text_on_its_side(tmp_path: Path) -> None:
    folder = write_files(tmp_path, count=60, seed=1)
    found, texts = look(folder), [file.read_text() for file in folder.iterdir()]
    assert sorted(found.held_out) == sorted(filter(is_held_out, texts))
    assert sorted(found.training) == sorted(text for text in texts if not is_held_out(text))
    assert found.held_out
    assert [look(folder).training, look(folder).held_out] == [found.training, found.held_out]


def test_held_out_documents_are_read_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_files(tmp_path, count=300, seed=1)
    opened: list[Path] = []
    expected = look(folder, training_bytes=2000).held_out
    assert len(expected) > 50
    read = Path.open

    def counted(path: Path, *args: Any, **settings: Any) -> Any:
        opened.append(path)
        return read(path, *args, **settings)

    monkeypatch.setattr(Path, "open", counted)
    found = look(folder, training_bytes=2000)
    assert 4 <= len(opened) < 60
    sent = pickle.loads(pickle.dumps(found))  # noqa: S301
    assert found.held_out == sent.held_out == expected
    assert len(opened) < 2 * 300  # both read on, neither reads anything again
    before = len(opened)
    assert found.held_out == expected
    assert len(opened) == before


def test_added_files_move_no_document_to_the_other_side(tmp_path: Path) -> None:
    before = look(write_files(tmp_path, count=60, seed=1))
    after = look(write_files(tmp_path, count=60, seed=2))
    assert set(before.held_out) < set(after.held_out)
    assert set(before.training) < set(after.training)


def test_no_more_is_read_than_is_wanted(tmp_path: Path) -> None:
    folder = write_files(tmp_path, count=300, seed=1)
    little = look(folder, training_bytes=2000, held_out_bytes=2000)
    assert 2000 <= sum(map(len, little.training)) < 4000
    assert 2000 <= sum(map(len, little.held_out)) < 40_000  # a long one counts for its share alone
    assert len(little.held_out) < len(look(folder).held_out)
    assert look(folder, training_bytes=0).training[1:] == []


def test_a_long_document_does_not_stand_for_all(tmp_path: Path) -> None:
    folder = write_files(tmp_path, count=20, seed=1)
    (folder / "0.txt").write_text("novel " * 10_000)
    assert len(look(folder, training_bytes=3000).training) >= 4


def test_a_source_without_training_documents_or_with_bad_ones_is_named(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "a", count=3, seed=1)
    with pytest.raises(DataError, match="source 'code': no training document, all fell to validation; lower"):
        look(folder, validation_share=1 - 1e-9)
    for index in range(2):
        (folder / f"bad{index}.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"2 of 5 records are bad, more than max_bad_share 0.05[^$]*bad\d.txt"):
        look(folder)
    assert look(folder, max_bad_share=0.4).training


class ManyLists(ListReader):
    """Counts the records that were taken from it."""

    taken = 0

    def read(self, chunk: int, *, start: int = 0) -> Iterator[Record]:
        for record in super().read(chunk, start=start):
            self.taken += 1
            yield record


def named(side: str, count: int, *, length: int = 10) -> list[str]:
    """Texts of `length` bytes that all fall to `side`."""
    found = (f"{number:010}".ljust(length, "x") for number in range(10_000))
    return list(islice((text for text in found if is_held_out(text) == (side == "held_out")), count))


def look_at(
    patch: pytest.MonkeyPatch, chunks: Sequence[Sequence[str | None]], **changes: Any
) -> tuple[Survey, ManyLists]:
    reader = ManyLists(chunks)

    def opened(_source: Source, *, min_chunks: int) -> ManyLists:
        assert min_chunks == 1  # more would read small sources in pieces, with a warning
        return reader

    patch.setattr("datamodules.streaming.survey.open_reader", opened)
    return look(Path("anywhere"), **changes), reader


def test_chunks_come_in_an_order_of_their_own_and_are_read_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    training, held_out = named("training", 40), named("held_out", 20)
    chunks = [[*training[2 * index : 2 * index + 2], held_out[index]] for index in range(20)]
    found, reader = look_at(monkeypatch, chunks, training_bytes=30)  # of which each document brings 8
    assert (len(found.training), reader.taken, len(reader.opened)) == (4, 5, 2)
    assert sorted(found.held_out) == sorted(held_out)
    assert reader.taken == 60
    order = [chunk for chunk, _ in reader.opened]
    assert reader.opened == [(order[0], 0), (order[1], 0), (order[1], 2), *((chunk, 0) for chunk in order[3:])]
    assert sorted(set(order)) == list(range(20)) != list(dict.fromkeys(order))
    again, reader = look_at(monkeypatch, chunks, training_bytes=30)
    assert (again.training, again.held_out) == (found.training, found.held_out)


@pytest.mark.parametrize("wanted", [0, 1, 9, 10, 11])
def test_reading_stops_at_the_document_that_is_the_last_one_wanted(
    monkeypatch: pytest.MonkeyPatch, wanted: int
) -> None:
    """Of 10 bytes, a quarter and one more are what a training document counts for; a 64th and one, a held-out one."""
    each = 1 + wanted // 4
    found, reader = look_at(monkeypatch, [named("training", 20)], training_bytes=wanted, held_out_bytes=0)
    assert len(found.training) == reader.taken == max(1, -(-wanted // each))
    assert set(map(len, found.training)) == {each if wanted else 1}
    assert found.held_out == []
    assert len(reader.opened) == 1
    found, reader = look_at(monkeypatch, [named("training", 1) + named("held_out", 20)], held_out_bytes=wanted)
    assert len(found.held_out) == wanted  # one byte each
    assert set(map(len, found.held_out)) <= {10}  # held-out documents stay whole


def test_bytes_are_counted_not_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text for number in range(40) if not is_held_out(text := f"{number:02}" + "é" * 10)]  # of 22 bytes
    found, _ = look_at(monkeypatch, [texts], training_bytes=88)
    assert len(found.training) == 4
    assert found.training == texts[:4]


def test_found_before_it_was_asked_for_is_no_more_than_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = [*named("held_out", 90, length=10), *named("training", 10)]
    found, _ = look_at(monkeypatch, [mixed], held_out_bytes=64 * 3)
    assert len(found.held_out) == 64 * 3 / 4


def test_a_search_for_held_out_documents_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("datamodules.streaming.survey._MAX_BYTES", 100)
    chunks = [[text] for text in named("training", 40)]
    found, reader = look_at(monkeypatch, chunks, training_bytes=1)
    assert found.held_out == []
    assert reader.taken == 11  # of ten bytes each
    assert "source 'code': few of its documents are held out; raise validation_share" in caplog.text
    found, reader = look_at(monkeypatch, chunks[:10], training_bytes=1)
    assert found.held_out == []
    assert reader.taken == 10
    assert caplog.text.count("raise validation_share") == 1


def test_bad_records_stop_the_look_no_sooner_than_chance_explains(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "datamodules")
    good = [[text] * 4 for text in named("training", 40)]
    with pytest.raises(DataError, match="12 of 12 records are bad"):  # the fourth bad chunk in a row is too much
        look_at(monkeypatch, [[None] * 4] * 3)
    with pytest.raises(DataError, match="16 of 16 records are bad"):
        look_at(monkeypatch, [[None] * 4] * 40, max_bad_share=0.0)
    found, _ = look_at(monkeypatch, [*good, [None] * 4], max_bad_share=0.03)
    assert len(found.training) == 160
    with pytest.raises(DataError, match=r"4 of 164 records are bad, more than max_bad_share 0\.02"):
        look_at(monkeypatch, [*good, [None] * 4], max_bad_share=0.02)
    assert not caplog.records  # the stream will say it


def test_a_source_of_which_nothing_can_be_read_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"'code': no training document, none could be read; add documents\n  0:0: bad"):
        look_at(monkeypatch, [[None]], max_bad_share=1.0)


def test_rows_are_spread_over_the_documents() -> None:
    documents: list[Tokens] = [np.full(length, index, dtype=np.int32) for index, length in enumerate([8, 800, 8, 8])]
    rows = spread_rows(documents, seq_len=8, num_rows=100)
    assert [row.input_ids[0] for row in rows] == [0, 1, 1, 1, 1, 2, 3]  # a long document gives its head
    assert [row.input_ids[0] for row in spread_rows(documents, seq_len=8, num_rows=4)] == [0, 1, 1, 2]
    assert spread_rows([], seq_len=8, num_rows=3) == []
