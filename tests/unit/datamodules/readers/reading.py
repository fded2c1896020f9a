"""What all tests of readers do: read everything, and tell good from bad."""

from typing import Any

from datamodules.readers import open_reader
from datamodules.readers.records import BadRecord, Reader, Record
from datamodules.readers.sources import Source

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"


def open_path(path: object, *, min_chunks: int = 1, **settings: Any) -> Reader:
    return open_reader(Source(name="notes", path=str(path), **settings), min_chunks=min_chunks)


def read_all(reader: Reader) -> list[Record]:
    return [record for chunk in range(reader.num_chunks) for record in reader.read(chunk)]


def texts(reader: Reader) -> list[str]:
    return sorted(record.text for record in read_all(reader) if not isinstance(record, BadRecord))


def bad(reader: Reader) -> list[tuple[str, str]]:
    return sorted(tuple(record) for record in read_all(reader) if isinstance(record, BadRecord))


def assert_any_start_reads_on(reader: Reader) -> None:
    """Reading from the middle gives what reading from the beginning gives there."""
    for chunk in range(reader.num_chunks):
        whole = list(reader.read(chunk))
        for start in {0, 1, 2, len(whole) // 2, len(whole), len(whole) + 1}:
            assert list(reader.read(chunk, start=start)) == whole[start:]
