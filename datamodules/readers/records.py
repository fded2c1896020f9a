"""The records that every reader gives, and what it promises about them.

Tested by tests/unit/datamodules/readers/test_opening.py and test_sources.py.
"""

from collections.abc import Iterable, Iterator
from hashlib import sha256
from typing import NamedTuple, Protocol

import numpy as np

from datamodules.readers.sources import Source

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
        """Whether the document belongs to validation. Its content alone decides, so other files cannot move it."""
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

    Every record is in exactly one chunk; a chunk may have none. The same files give the same chunks on every machine,
    at every rank and at any time.
    """

    @property
    def num_chunks(self) -> int:
        """Number of chunks, 1 or more."""

    @property
    def fingerprint(self) -> str:
        """A hash by which a resumed run knows that its position still means the same records."""

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
