"""The content of files: bytes that may be compressed, the texts in them, and what can be wrong with either.

Tested by tests/unit/datamodules/readers/test_line_files.py, test_whole_files.py and test_hub.py.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

from app.git_lfs import IS_POINTER, POINTER
from datamodules.readers.records import EMPTY

READ_ERRORS = (OSError, EOFError, zlib.error, pa.ArrowException)
_CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
_BLOCK_BYTES = 1 << 17


def is_compressed(name: str) -> bool:
    """Whether a file of this name is compressed."""
    return Path(name).suffix in _CODECS


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed if its name says so; several compressed streams in one file are joined.

    Opening and reading raise READ_ERRORS: the file is missing, unreadable or damaged.
    """
    codec = _CODECS.get(path.suffix)
    with path.open("rb", buffering=_BLOCK_BYTES if codec is None else 0) as raw:
        refuse_pointer(raw)
        if codec is None:
            yield raw
        elif codec == "gzip":  # unlike Arrow, it takes the zeros that tapes and block devices leave at the end
            with gzip.GzipFile(fileobj=raw) as unpacked:
                yield io.BufferedReader(cast(io.RawIOBase, unpacked), _BLOCK_BYTES)
        else:
            with pa.CompressedInputStream(raw, codec) as stream:
                yield cast(BinaryIO, io.BufferedReader(stream, _BLOCK_BYTES))


def refuse_pointer(raw: BinaryIO) -> None:
    """Raise OSError if a file is the pointer that git-lfs keeps instead of a large one; else leave it at its start."""
    begins = raw.read(len(POINTER))
    raw.seek(0)
    if begins == POINTER:
        raise OSError(IS_POINTER)


def size_change(path: Path, size: int) -> str:
    """A message if a file no longer has the size it was listed with; else ""."""
    now = path.stat().st_size
    return "" if now == size else f"changed since the source was opened: from {size} to {now} bytes"


def why_unreadable(error: Exception) -> str:
    """The reason of a failed read, without the path."""
    return f"cannot be read: {(isinstance(error, OSError) and error.strerror) or error}"


def decode(raw: bytes) -> tuple[str, str]:
    """The text, or "" and the reason why there is none."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return "", f"not UTF-8 at byte {error.start}"
    return ("", EMPTY) if _is_blank(text) else (text, "")


class JsonField:
    """Reads one field of JSON objects; `a.b` also means `b` inside of `a`, if there is no field `a.b`."""

    def __init__(self, field: str) -> None:
        self._field, self._path = field, field.split(".")

    def read(self, raw: bytes) -> tuple[str, str]:
        """The text in a line, or "" and the reason why there is none."""
        line, problem = decode(raw)
        if problem:
            return "", problem
        try:
            text, problem = self.pick(json.loads(line))
            text.encode()
        except UnicodeEncodeError as error:
            return "", f"field {self._field!r} has half a surrogate pair at character {error.start}"
        except (ValueError, RecursionError) as error:
            return "", f"malformed JSON: {error}"
        return text, problem

    def pick(self, value: object) -> tuple[str, str]:
        """The text in an object, or "" and the reason why there is none."""
        if not isinstance(value, dict):
            return "", f"not a JSON object but {type(value).__name__}"
        found: object = value
        for key in [self._field] if self._field in value else self._path:
            if not isinstance(found, dict) or key not in found:
                return "", f"no field {self._field!r}; it has {', '.join(map(repr, list(value)[:20]))}"
            found = found[key]
        if not isinstance(found, str):
            return "", f"field {self._field!r} is {type(found).__name__}, not text"
        return ("", f"field {self._field!r} is empty") if _is_blank(found) else (found, "")


def _is_blank(text: str) -> bool:
    return not text or text.isspace()
