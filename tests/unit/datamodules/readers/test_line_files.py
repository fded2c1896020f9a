import bz2
import codecs
import gzip
import json
import tempfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.readers import line_files
from datamodules.readers.records import BadRecord, Document
from tests.unit.datamodules.readers.reading import assert_any_start_reads_on, bad, open_path, read_all, texts

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "zst": lambda raw: pa.Codec("zstd").compress(raw, asbytes=True),  # type: ignore[no-any-return]
}


def jsonl(*values: object) -> bytes:
    return b"".join(json.dumps({"text": value}).encode() + b"\n" for value in values)


LINE = st.one_of(st.just(b""), st.just(b" \t"), st.integers(0, 9).map(lambda n: f"line é {n}".encode() * n))
FILE = st.tuples(st.booleans(), st.lists(st.tuples(LINE, st.sampled_from([b"\n", b"\r\n"])), max_size=8), st.booleans())


@settings(max_examples=60)
@given(st.lists(FILE, min_size=1, max_size=4), st.integers(1, 80))
def test_every_line_is_in_exactly_one_chunk(
    files: list[tuple[bool, list[tuple[bytes, bytes]], bool]], min_chunks: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        expected = []
        for index, (has_bom, lines, ends) in enumerate(files):
            raw = codecs.BOM_UTF8 * has_bom + b"".join(line + end for line, end in lines)
            raw = raw if ends else raw.removesuffix(b"\n").removesuffix(b"\r")
            Path(folder, f"{index}.txt").write_bytes(raw)
            expected += [line.decode() for line, _ in lines if line.strip()]
        Path(folder, "never-empty.txt").write_bytes(b"last")
        reader = open_path(folder, kind="lines", min_chunks=min_chunks)
        assert texts(reader) == sorted([*expected, "last"])
        assert not bad(reader)
        assert_any_start_reads_on(reader)


def test_a_document_is_named_by_file_and_offset_and_a_bad_line_by_file_and_number(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n\ntwo\n\xff\nthree\n")
    for min_chunks in range(1, 12):
        records = read_all(open_path(tmp_path, kind="lines", min_chunks=min_chunks))
        assert records == [
            Document("a.txt@0", "one", "one"),
            Document("a.txt@5", "two", "two"),
            BadRecord("a.txt:4", "not UTF-8 at byte 0"),
            Document("a.txt@11", "three", "three"),
        ]


BAD_LINES = [
    (b"{broken", "malformed JSON"),
    (b'{"text": "cut', "malformed JSON"),
    (b"[" * 100_000, "malformed JSON"),
    (b'{"text": "a"} {"text": "b"}', "malformed JSON"),
    (b'{"other": "a", "more": 1}', "no field 'text'; it has 'other', 'more'"),
    (b'{"text": 3}', "field 'text' is int, not text"),
    (b'{"text": null}', "field 'text' is NoneType, not text"),
    (b'{"text": ["a"]}', "field 'text' is list, not text"),
    (b'["text"]', "not a JSON object but list"),
    (b'"text"', "not a JSON object but str"),
    (b'{"text": ""}', "field 'text' is empty"),
    (b'{"text": " \\n\\t"}', "field 'text' is empty"),
    (b'{"text": "caf\xe9"}', "not UTF-8 at byte 13"),
    (b'{"text": "half \\ud83d"}', "field 'text' has half a surrogate pair at character 5"),
    (b'{"text": "' + b"x" * 1000 + b'"}', "longer than 500 bytes"),
    (b'{"text": "' + b"x" * 505 + b'"}', "longer than 500 bytes"),
]


def test_every_sort_of_bad_line_is_reported_with_its_location_and_reading_goes_on(tmp_path: Path) -> None:
    lines = [line for raw, _ in BAD_LINES for line in (raw, b'{"text": "good"}')]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    expected = [
        (f"a.jsonl:{2 * index + 1}", "longer than 500 bytes" if len(raw) > 500 else reason)
        for index, (raw, reason) in enumerate(BAD_LINES)
    ]
    for min_chunks in (1, 7, 200):
        reader = open_path(tmp_path, kind="jsonl", min_chunks=min_chunks, max_document_megabytes=0.0005)
        assert texts(reader) == ["good"] * len(BAD_LINES)
        found = bad(reader)
        assert [location for location, _ in found] == sorted(location for location, _ in expected)
        assert all(reason.startswith(dict(expected)[location]) for location, reason in found)


@pytest.mark.parametrize(
    "content", ['[{"text": "a"}, {"text": "b"}]', '[\n  {\n    "text": "a"\n  },\n  {"text": "b"}\n]\n']
)
def test_of_a_json_array_it_is_said_what_it_is(tmp_path: Path, content: str) -> None:
    (tmp_path / "alpaca.json").write_text(content)
    for min_chunks in (1, 4):
        reasons = {reason for _, reason in bad(open_path(tmp_path, kind="jsonl", glob="*.json", min_chunks=min_chunks))}
        assert reasons == {"the file is a JSON array, not an object a line: jq -c '.[]' FILE > FILE.jsonl makes it one"}


def test_what_python_writes_is_read_even_if_strict_json_forbids_it(tmp_path: Path) -> None:
    rows = [{"text": "a", "score": float("nan")}, {"text": "b", "tag": "\ud83d"}, {"text": "😀", "id": 2**80}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert texts(open_path(tmp_path, kind="jsonl")) == ["a", "b", "😀"]


def test_a_field_can_lie_inside_another(tmp_path: Path) -> None:
    rows = [{"a": {"b": "inside"}}, {"a.b": "spelled so"}, {"a": "flat"}, {"a": {"c": 1}}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    reader = open_path(tmp_path, kind="jsonl", field="a.b")
    assert texts(reader) == ["inside", "spelled so"]
    assert bad(reader) == [("a.jsonl:3", "no field 'a.b'; it has 'a'"), ("a.jsonl:4", "no field 'a.b'; it has 'a'")]


@pytest.mark.parametrize("bom", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_the_longest_line_is_just_as_long_as_the_limit(tmp_path: Path, bom: bytes, end: bytes) -> None:
    rest = ["next"] if end else []
    for length in range(94, 108):
        (tmp_path / "a.txt").write_bytes(bom + b"x" * length + end + (b"next" if end else b""))
        reader = open_path(tmp_path, kind="lines", max_document_megabytes=0.0001)
        assert texts(reader) == (rest if length > 100 else [*rest, "x" * length])
        assert bad(reader) == ([("a.txt:1", "longer than 100 bytes")] if length > 100 else [])


@pytest.mark.parametrize("codec", COMPRESS)
@pytest.mark.parametrize("min_chunks", [1, 3, 8])
def test_compressed_files_of_several_streams_read_like_plain_ones(
    tmp_path: Path, codec: str, min_chunks: int, caplog: pytest.LogCaptureFixture
) -> None:
    for name in "ab":
        streams = [COMPRESS[codec](jsonl(*(f"{name} {part} {i}" for i in range(100)))) for part in range(3)]
        (tmp_path / f"{name}.jsonl.{codec}").write_bytes(b"".join(streams))
    (tmp_path / "plain.jsonl").write_bytes(jsonl(*(f"plain {i}" for i in range(50))))
    reader = open_path(tmp_path, kind="jsonl", min_chunks=min_chunks)
    expected = [f"{name} {part} {i}" for name in "ab" for part in range(3) for i in range(100)]
    assert texts(reader) == sorted(expected + [f"plain {i}" for i in range(50)])
    assert not bad(reader)
    assert_any_start_reads_on(reader)
    assert reader.num_chunks >= 2 * min_chunks
    assert all(next(iter(reader.read(chunk)), None) for chunk in range(min_chunks, reader.num_chunks))
    assert ("would read faster" in caplog.text) == (min_chunks > 2)


@pytest.mark.parametrize("codec", COMPRESS)
@pytest.mark.parametrize("min_chunks", [1, 3])
def test_a_compressed_file_that_is_cut_or_damaged_is_read_as_far_as_it_goes(
    tmp_path: Path, codec: str, min_chunks: int
) -> None:
    rows = [f"{i} {sha256(b'%d' % i).hexdigest()}" for i in range(8_000)]
    whole = COMPRESS[codec](jsonl(*rows[:4_000])) + COMPRESS[codec](jsonl(*rows[4_000:]))
    (tmp_path / f"good.jsonl.{codec}").write_bytes(COMPRESS[codec](jsonl("good")))
    for content in (whole[:-5], whole[: len(whole) * 3 // 4], whole + b"garbage behind the end"):
        (tmp_path / f"a.jsonl.{codec}").write_bytes(content)
        reader = open_path(tmp_path, kind="jsonl", min_chunks=min_chunks)
        records = read_all(reader)
        found = {record.text for record in records if isinstance(record, Document)}
        assert {"good"} < found <= {"good", *rows}
        assert len(found) >= 3_000
        [problem] = [record for record in records if isinstance(record, BadRecord)]
        assert problem.location == f"a.jsonl.{codec}"
        assert problem.reason.startswith("cannot be read: ")


def test_a_file_that_is_not_what_its_name_says_is_one_bad_record(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl("good"))
    (tmp_path / "b.jsonl.gz").write_bytes(jsonl("not compressed at all"))
    reader = open_path(tmp_path, kind="jsonl")
    assert texts(reader) == ["good"]
    assert [location for location, _ in bad(reader)] == ["b.jsonl.gz"]


def test_files_that_vanish_or_change_under_the_reader_are_reported(tmp_path: Path) -> None:
    for name in ("gone", "grown", "kept", "shorter"):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl(*(f"{name} {i}" for i in range(10))))
    (tmp_path / "gone.jsonl.gz").write_bytes(gzip.compress(jsonl("gone")))
    reader = open_path(tmp_path, kind="jsonl")
    assert len(texts(reader)) == 41
    (tmp_path / "gone.jsonl").unlink()
    (tmp_path / "gone.jsonl.gz").unlink()
    (tmp_path / "grown.jsonl").write_bytes(jsonl(*(f"grown {i}" for i in range(20))))
    (tmp_path / "shorter.jsonl").write_bytes(jsonl("shorter 0", "shorter 1")[:-3])
    assert texts(reader) == sorted([*(f"grown {i}" for i in range(10)), *(f"kept {i}" for i in range(10)), "shorter 0"])
    assert [(location, reason.split(":")[0]) for location, reason in bad(reader)] == [
        ("gone.jsonl", "cannot be read"),
        ("gone.jsonl.gz", "cannot be read"),
        ("grown.jsonl", "changed since the source was opened"),
        ("shorter.jsonl", "changed since the source was opened"),
        ("shorter.jsonl:2", "malformed JSON"),
    ]


def test_a_file_that_cannot_be_opened_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl("a" * 100))
    (tmp_path / "b.jsonl").write_bytes(jsonl("b"))
    reader = open_path(tmp_path, kind="jsonl")
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "a.jsonl").mkdir()
    assert texts(reader) == ["b"]
    assert bad(reader) == [("a.jsonl", "cannot be read: Is a directory")]


def test_deep_in_a_huge_file_a_bad_line_is_placed_by_its_offset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_files, "_COUNTED_BYTES", 100)
    (tmp_path / "a.txt").write_bytes(b"0123456789\n" * 20 + b"\xff\n" + b"0123456789\n" * 20)
    assert bad(open_path(tmp_path, kind="lines", min_chunks=10)) == [("a.txt:byte 220", "not UTF-8 at byte 0")]
    assert bad(open_path(tmp_path, kind="lines", min_chunks=1)) == [("a.txt:21", "not UTF-8 at byte 0")]


def test_a_file_without_newlines_is_never_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte is read about once, in blocks: not once for every chunk, and never as one line."""
    with (tmp_path / "a.txt").open("wb") as file:
        for _ in range(40):
            file.write(b"x" * 1_000_000)
    read: list[int] = []

    class Counted:
        def __init__(self, stream: object) -> None:
            self._stream = stream

        def seek(self, offset: int) -> None:
            self._stream.seek(offset)  # type: ignore[attr-defined]

        def readline(self, limit: int) -> bytes:
            read.append(len(line := self._stream.readline(limit)))  # type: ignore[attr-defined]
            return line  # type: ignore[no-any-return]

    lines_of = line_files._LineRange._lines_of
    monkeypatch.setattr(
        line_files._LineRange, "_lines_of", lambda self, stream, size: lines_of(self, Counted(stream), size)
    )
    assert bad(open_path(tmp_path, kind="lines", max_document_megabytes=1.0)) == [
        ("a.txt:1", "longer than 1000000 bytes")
    ]
    assert sum(read) < 2 * 40_000_000
    assert max(read) < 2_000_000
