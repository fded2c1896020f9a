"""The bytes of a file, which may be compressed, and what can be wrong with the file itself.

Tested by tests/unit/datamodules/readers/test_line_files.py and test_whole_files.py.
"""

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

READ_ERRORS = (OSError, EOFError, zlib.error, pa.ArrowException)
_CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
_BLOCK_BYTES = 1 << 17


def is_compressed(name: str) -> bool:
    """Whether a file of this name is compressed."""
    return Path(name).suffix in _CODECS


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed if its name says so; several compressed streams in one file are joined.

    Raises:
        One of READ_ERRORS: The file is missing, unreadable or damaged; while it is opened or while it is read.
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
