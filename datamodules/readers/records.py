"""The records that readers give, and what can be wrong with them. Tested by test_opening.py, test_line_files.py."""

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol, cast

import numpy as np
import pyarrow as pa

from app.git_lfs import IS_POINTER, POINTER
from datamodules.readers.sources import Source

READ_ERRORS = (OSError, EOFError, zlib.error, pa.ArrowException)
_CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
_BLOCK_BYTES = 1 << 17
EMPTY = "empty"
_VERSION = 2  # of fingerprints: raise it when the same files are cut or counted in another way


class Document(NamedTuple):
    """One text of a source.

    The hash of `origin` decides whether the document is held out. It is `text` itself except for docstrings, which
    follow the module they were taken from: held-out prose would else be trained on as code.
    """

    name: str
    text: str
    origin: str

    def is_held_out(self, *, share: float) -> bool:
        """Tell whether the document belongs to validation. Its content alone decides, so other files cannot move it."""
        digest = sha256(self.origin.encode()).digest()
        return int.from_bytes(digest[:8], "big") < share * 2**64


class BadRecord(NamedTuple):
    """A document that could not be read, and why.

    Its location is `file:line` or `file:row N` (from 1), `file:byte N` deep in a huge file, or the file alone.
    """

    location: str
    reason: str

    @property
    def is_empty(self) -> bool:
        """Whether there was just no text, which is common (`__init__.py`) and no sign of damage."""
        return self.reason == EMPTY


class LostRecords(BadRecord):
    """The rest of a file or of a part of one, however many records it held."""


Record = Document | BadRecord


class Reader(Protocol):
    """The records of one source, cut into chunks that can be read in any order, each in constant memory.

    Every record is in exactly one of the chunks, which are 1 or more; a chunk may have none. The same files give the
    same chunks on every machine, at every rank and at any time. By the fingerprint, a hash, a resumed run knows that
    its position still means the same records.
    """

    @property
    def num_chunks(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    def read(self, chunk: int, *, start: int = 0) -> Iterator[Record]:
        """Yield the records of `chunk` from index `start` on, with a BadRecord for what cannot be read."""


def fingerprint(source: Source, parts: Iterable[bytes], *layout: int | np.ndarray) -> str:
    """Hash what the records are (`parts`: names, sizes, samples) and how chunks hold them (`layout`)."""
    total = sha256(repr((_VERSION, source.kind, source.field)).encode())
    for part in parts:
        total.update(part)
    for item in layout:
        total.update(item.astype("<i8").tobytes() if isinstance(item, np.ndarray) else b"%d\0" % item)
    return total.hexdigest()[:32]


def is_compressed(name: str) -> bool:
    """Tell whether a file of this name is compressed."""
    return Path(name).suffix in _CODECS


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed if its name says so; READ_ERRORS if it is missing, unreadable or damaged."""
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
    """Return a message if a file no longer has the size it was listed with; else ""."""
    now = path.stat().st_size
    return "" if now == size else f"changed since the source was opened: from {size} to {now} bytes"


def why_unreadable(error: Exception) -> str:
    """Return the reason of a failed read, without the path."""
    return f"cannot be read: {(isinstance(error, OSError) and error.strerror) or error}"


def decode(raw: bytes) -> tuple[str, str]:
    """Return the text, or "" and the reason why there is none."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return "", f"not UTF-8 at byte {error.start}"
    return ("", EMPTY) if _is_blank(text) else (text, "")


class JsonField:
    """Read one field of JSON objects; `a.b` also means `b` inside of `a`, if there is no field `a.b`."""

    def __init__(self, field: str) -> None:
        self._field, self._path = field, field.split(".")

    def read(self, raw: bytes) -> tuple[str, str]:
        """Return the text in a line, or "" and the reason why there is none."""
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
        """Return the text in an object, or "" and the reason why there is none."""
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
