"""Bytes of a file that may be compressed, and what can be wrong with the file itself."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

from app.git_lfs import IS_POINTER, POINTER

_CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
READ_ERRORS = (OSError, EOFError, zlib.error, pa.ArrowException)
_BLOCK_BYTES = 1 << 17


def is_compressed(name: str) -> bool:
    """Whether a file of this name is compressed."""
    return Path(name).suffix in _CODECS


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed if its name says that it is compressed; several streams in one file join.

    Raises:
        One of READ_ERRORS: At opening or while reading: the file is gone, unreadable or damaged.
    """
    codec = _CODECS.get(path.suffix)
    with path.open("rb", buffering=_BLOCK_BYTES if codec is None else 0) as raw:
        refuse_pointer(raw)
        if codec is None:
            yield raw
        elif codec == "gzip":  # unlike Arrow it takes the zeros that tapes and block devices leave at the end
            with gzip.GzipFile(fileobj=raw) as unpacked:
                yield io.BufferedReader(cast(io.RawIOBase, unpacked), _BLOCK_BYTES)
        else:
            with pa.CompressedInputStream(raw, codec) as stream:
                yield cast(BinaryIO, io.BufferedReader(stream, _BLOCK_BYTES))


def refuse_pointer(raw: BinaryIO) -> None:
    """Raise OSError if a file at its beginning is what git keeps in the place of a large one; else leave it there."""
    begins = raw.read(len(POINTER))
    raw.seek(0)
    if begins == POINTER:
        raise OSError(IS_POINTER)


def size_change(path: Path, size: int) -> str:
    """What to say if a file no longer has the size it was listed with; else nothing."""
    now = path.stat().st_size
    return "" if now == size else f"changed since the source was opened: from {size} to {now} bytes"


def why(error: Exception) -> str:
    """The reason of a failed read, without the path."""
    return f"cannot be read: {(isinstance(error, OSError) and error.strerror) or error}"


def decode(raw: bytes) -> tuple[str, str]:
    """The text, or nothing and the reason why there is none."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return "", f"not UTF-8 at byte {error.start}"
    return ("", "empty") if is_blank(text) else (text, "")


def is_blank(text: str) -> bool:
    """Whether there is nothing to learn from `text`."""
    return not text or text.isspace()
