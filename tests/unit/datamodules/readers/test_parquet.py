import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.errors import DataError
from datamodules.readers.records import Document
from tests.unit.datamodules.readers.reading import POINTER, assert_any_start_reads_on, bad, open_path, read_all, texts

ROWS = [f"row {index} " + "word " * (index % 7) for index in range(1000)]
NOT_UTF8 = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 2, 4], np.int32)), pa.py_buffer(b"\xff\xfeok"))


def write(path: Path, column: Any, *, name: str = "text", group: int = 1000, **options: Any) -> None:
    pq.write_table(pa.table({"id": list(range(len(column))), name: column}), path, row_group_size=group, **options)


@pytest.mark.parametrize(("group", "min_chunks"), [(7, 25), (300, 4), (1000, 1), (1000, 25)])
def test_every_row_is_in_exactly_one_chunk(tmp_path: Path, min_chunks: int, group: int) -> None:
    write(tmp_path / "a.parquet", ROWS[:600], group=group)
    write(tmp_path / "b.parquet", ROWS[600:], group=group)
    reader = open_path(tmp_path, kind="parquet", min_chunks=min_chunks)
    assert texts(reader) == sorted(ROWS)
    assert reader.num_chunks >= min_chunks
    assert_any_start_reads_on(reader)
    assert Document("a.parquet:row 600", ROWS[599], ROWS[599]) in read_all(reader)


def test_row_groups_of_about_a_mebibyte_are_chunks(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [f"{index} " + "x" * 1000 for index in range(10_000)], group=2000)
    assert open_path(tmp_path, kind="parquet").num_chunks == 5


@pytest.mark.parametrize(
    "column",
    [
        pa.array(ROWS, pa.large_string()),
        pa.array(ROWS).dictionary_encode(),
        pa.array([row.encode() for row in ROWS], pa.binary()),
        pa.array(ROWS, pa.string_view()),
    ],
    ids=["large_string", "dictionary", "binary", "view"],
)
def test_a_column_may_hold_text_in_any_of_arrows_forms(tmp_path: Path, column: pa.Array) -> None:
    write(tmp_path / "a.parquet", column)
    assert texts(open_path(tmp_path, kind="parquet")) == sorted(ROWS)


def test_a_column_can_lie_inside_another(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [{"b": "inside", "c": 1}, None, {"b": None, "c": 2}], name="a")
    write(tmp_path / "b.parquet", ["spelled so"], name="a.b")
    reader = open_path(tmp_path, kind="parquet", field="a.b")
    assert texts(reader) == ["inside", "spelled so"]
    assert bad(reader) == [(f"a.parquet:row {row}", "column 'a.b' is null") for row in (2, 3)]


def test_bad_rows_and_files_are_reported_with_their_locations(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ["good", None, "", " \n", "x" * 101, "x" * 100], group=4)
    write(tmp_path / "b.parquet", NOT_UTF8)
    write(tmp_path / "c.parquet", ["a"], name="other")
    write(tmp_path / "d.parquet", [1, 2])
    (tmp_path / "e.parquet").write_bytes(b"PAR1 or not")
    (tmp_path / "f.parquet").write_bytes(b"")
    (tmp_path / "g.parquet").write_bytes(POINTER)
    reader = open_path(tmp_path, kind="parquet", max_document_megabytes=0.0001)
    assert texts(reader) == ["good", "ok", "x" * 100]
    found = dict(bad(reader))
    assert found.pop("e.parquet").startswith("cannot be read: ")
    assert found.pop("f.parquet").startswith("cannot be read: ")
    assert found.pop("g.parquet").startswith("cannot be read: a git-lfs pointer")
    assert found == {
        "a.parquet:row 2": "column 'text' is null",
        "a.parquet:row 3": "empty",
        "a.parquet:row 4": "empty",
        "a.parquet:row 5": "longer than 100 bytes",
        "b.parquet:row 1": "not UTF-8 at byte 0",
        "c.parquet": "cannot be read: no column 'text'; it has 'id', 'other'",
        "d.parquet": "cannot be read: column 'text' is int64, not text",
    }
    assert_any_start_reads_on(reader)


def test_a_damaged_row_group_does_not_hide_the_others(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ROWS, group=250)
    metadata = pq.read_metadata(tmp_path / "a.parquet")
    column = metadata.row_group(1).column(1)
    raw = bytearray((tmp_path / "a.parquet").read_bytes())
    begin = column.dictionary_page_offset or column.data_page_offset
    raw[begin : begin + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    (tmp_path / "a.parquet").write_bytes(raw)
    reader = open_path(tmp_path, kind="parquet")
    assert texts(reader) == sorted(ROWS[:250] + ROWS[500:])
    [(location, reason)] = bad(reader)
    assert (location, reason[:28]) == ("a.parquet", "row group 2: cannot be read:")


def test_a_file_that_vanishes_or_changes_is_reported(tmp_path: Path) -> None:
    for name in "abc":
        write(tmp_path / f"{name}.parquet", [name])
    reader = open_path(tmp_path, kind="parquet")
    (tmp_path / "a.parquet").unlink()
    write(tmp_path / "b.parquet", ["b"] * 100 + ["more"])
    assert texts(reader) == ["c"]
    assert [(location, reason[:35]) for location, reason in bad(reader)] == [
        ("a.parquet", "row group 1: cannot be read: No suc"),
        ("b.parquet", "row group 1: changed since the sour"),
    ]


@pytest.mark.parametrize(
    ("column", "name", "message"),
    [
        (["a"], "other", r"'notes'.*none of 1 files.*no column 'text'; it has 'id', 'other'"),
        ([1], "text", r"'notes'.*column 'text' is int64, not text"),
        (pa.array([], pa.string()), "text", r"'notes'.*no rows"),
    ],
)
def test_a_source_without_any_text_is_refused_at_opening(tmp_path: Path, column: Any, name: str, message: str) -> None:
    write(tmp_path / "a.parquet", column, name=name)
    with pytest.raises(DataError, match=message):
        open_path(tmp_path, kind="parquet")


def test_a_large_row_group_is_never_in_memory_whole(tmp_path: Path) -> None:
    rows = [f"{index}" * 2000 for index in range(5000)]
    write(tmp_path / "a.parquet", rows, group=5000, compression="none", use_dictionary=False)
    reader = open_path(tmp_path, kind="parquet")
    pool, before, peak = pa.default_memory_pool(), pa.default_memory_pool().bytes_allocated(), 0
    tracemalloc.start()  # for what Arrow makes Python read
    try:
        for _ in reader.read(0):
            peak = max(peak, pool.bytes_allocated() - before)
        peak += tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 1_000_000 < peak < 25_000_000 < (tmp_path / "a.parquet").stat().st_size
