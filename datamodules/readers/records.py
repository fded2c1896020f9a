"""What every reader gives and promises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from datamodules.readers.sources import Document

EMPTY = "empty"


class BadRecord(NamedTuple):
    """What stands in the place of a document that could not be read.

    Args:
        place: `file:line` (from 1), `file:byte N` deep in a huge file, `file:row N` (from 1), or the file alone.
        reason: What is wrong there, in words.
    """

    place: str
    reason: str

    @property
    def is_empty(self) -> bool:
        """Whether there was just no text, which is common (`__init__.py`) and no sign of damage."""
        return self.reason == EMPTY


class LostRecords(BadRecord):
    """All that was left of a file or a part of one, however many records those were."""


Record = Document | BadRecord


class Reader(Protocol):
    """The records of one source, cut into chunks that can be read in any order, each in constant memory.

    Every record is in exactly one chunk. The same files give the same chunks everywhere: nothing depends on the
    machine, the rank or the time. A chunk may have no record at all.
    """

    @property
    def num_chunks(self) -> int:
        """How many chunks there are; 1 or more."""

    @property
    def fingerprint(self) -> str:
        """A hash of names, sizes, a little of the content and chunk layout."""

    def read(self, chunk: int, *, start: int = 0) -> Iterator[Record]:
        """The records of `chunk` from index `start` on; a bad record counts like a good one.

        What cannot be read is a BadRecord, and reading goes on behind it; nothing is raised.
        """
