import bz2
import gzip
from pathlib import Path

import pyarrow as pa
import pytest

from datamodules.readers import open_reader
from datamodules.readers.records import Document
from datamodules.readers.sources import Source
from tests.unit.datamodules.readers.reading import POINTER, assert_any_start_reads_on, bad, open_path, read_all, texts


@pytest.mark.parametrize("min_chunks", [1, 3, 50])
def test_every_file_is_a_document_in_exactly_one_chunk(tmp_path: Path, min_chunks: int) -> None:
    (tmp_path / "sub").mkdir()
    expected = []
    for index in range(20):
        name = f"{'sub/' * (index % 2)}{index}.txt"
        expected.append(Document(name, f"text {index}\r\n", f"text {index}\r\n"))
        (tmp_path / name).write_bytes(expected[-1].text.encode())
    reader = open_path(tmp_path, kind="files", min_chunks=min_chunks)
    assert sorted(read_all(reader)) == sorted(expected)
    assert reader.num_chunks == min(min_chunks, 20)
    assert_any_start_reads_on(reader)


def test_compressed_files_are_documents_too(tmp_path: Path) -> None:
    (tmp_path / "a.py.gz").write_bytes(gzip.compress(b"a1 ") + gzip.compress(b"a2") + bytes(1000))
    (tmp_path / "b.py.bz2").write_bytes(bz2.compress(b"b"))
    (tmp_path / "c.py.zst").write_bytes(pa.Codec("zstd").compress(b"c", asbytes=True))
    assert texts(open_path(tmp_path, kind="files")) == ["a1 a2", "b", "c"]


def test_bad_files_are_reported_with_their_reason(tmp_path: Path) -> None:
    contents = {
        "changed": b"short",
        "cut.gz": gzip.compress(b"x" * 1000)[:-9],
        "empty": b"",
        "folder": b"becomes a folder",
        "gone": b"goes",
        "good": b"x" * 100,
        "latin": b"caf\xe9",
        "long": b"x" * 101,
        "long.gz": gzip.compress(b"x" * 1_000_000),
        "pointer": POINTER,
        "pointer.gz": POINTER,
        "white": b" \n\t",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    reader = open_path(tmp_path, kind="files", max_document_megabytes=0.0001)
    (tmp_path / "changed").write_bytes(b"longer than it was")
    (tmp_path / "gone").unlink()
    (tmp_path / "folder").unlink()
    (tmp_path / "folder").mkdir()
    assert texts(reader) == ["x" * 100]
    assert dict(bad(reader)) == {
        "changed": "changed since the source was opened: from 5 to 18 bytes",
        "cut.gz": "cannot be read: Compressed file ended before the end-of-stream marker was reached",
        "empty": "empty",
        "folder": "cannot be read: Is a directory",
        "gone": "cannot be read: No such file or directory",
        "latin": "not UTF-8 at byte 3",
        "long": "longer than 0.0001 megabytes",
        "long.gz": "longer than 0.0001 megabytes",
        "pointer": "cannot be read: a git-lfs pointer, not the file itself: run git lfs pull",
        "pointer.gz": "cannot be read: a git-lfs pointer, not the file itself: run git lfs pull",
        "white": "empty",
    }
    assert_any_start_reads_on(reader)


def test_a_library_gives_code_and_prose_whose_side_follows_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prose = "What this does is told at some length here, so that it counts as prose." + " Twice." * 3
    module = f'"""{prose}"""\n\ndef shout():\n    """Too short."""\n'
    files = {
        "pydoc_data/topics.py": "topics = {'assert': 'The assert statement', 'if': 'An if'}",
        "pydoc_data/other.py": "assert True",
        "test/test_loud.py": "assert True",
        "deep/tests/test_loud.py": "assert True",
        "site-packages/other.py": "assert True",
        "broken.py": "def",
        "escape.py": '"\\x' + "x" * 80 + '"',
        "loud.py": module,
        "loud.txt": "no module",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr("sysconfig.get_path", lambda _name: str(tmp_path))

    code = open_reader(Source(name="code", kind="stdlib_code"), min_chunks=1)
    assert sorted(read_all(code)) == [
        Document(name, files[name], files[name]) for name in ("broken.py", "escape.py", "loud.py")
    ]
    text = open_reader(Source(name="text", kind="stdlib_text"), min_chunks=1)
    assert sorted(record for record in read_all(text) if isinstance(record, Document)) == [
        Document("loud.py", f"loud\n\n{prose}\n", origin=module),
        Document("pydoc_data/topics.py:assert", "The assert statement", "The assert statement"),
        Document("pydoc_data/topics.py:if", "An if", "An if"),
    ]
    assert [(location, reason[:10]) for location, reason in bad(text)] == [("escape.py", "not Python")]
    assert_any_start_reads_on(text)
    for broken in ("topics = {", "pass", "topics = open"):
        (tmp_path / "pydoc_data" / "topics.py").write_text(broken)
        text = open_reader(Source(name="text", kind="stdlib_text"), min_chunks=1)
        assert ("pydoc_data/topics.py", "not Python") in [(location, reason[:10]) for location, reason in bad(text)]


def test_the_real_standard_library_is_listed() -> None:
    reader = open_reader(Source(name="code", kind="stdlib_code"), min_chunks=1)
    names = {record.name for record in read_all(reader) if isinstance(record, Document)}
    assert {"json/decoder.py", "argparse.py"} <= names
    assert not any(part in name.split("/") for name in names for part in ("test", "site-packages", "pydoc_data"))
