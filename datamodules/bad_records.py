"""What could not be read of a source: skipped, counted, logged with its place, and an error when it is too much."""

from __future__ import annotations

import logging

from app.errors import DataError
from datamodules.readers.records import BadRecord

log = logging.getLogger(__name__)

_MIN_RECORDS = 500  # before a share means anything
_SHOWN = 20


class BadRecords:
    """The records of one source as one process reads them.

    Args:
        source: Name of the source.
        max_share: Share of records that may be bad, in [0, 1].
        seen: Records read so far, by an earlier process.
        skipped: Those of them that were bad.
        quiet: Log nothing.
    """

    def __init__(self, source: str, *, max_share: float, seen: int = 0, skipped: int = 0, quiet: bool = False) -> None:
        self._source, self._max_share, self._level = source, max_share, logging.DEBUG if quiet else logging.INFO
        self.seen, self.skipped = seen, skipped
        self._examples: list[BadRecord] = []

    def good(self) -> None:
        """Count a document."""
        self.seen += 1

    def bad(self, record: BadRecord) -> None:
        """Count a record that was skipped; the first ones are logged one by one."""
        self.seen, self.skipped = self.seen + 1, self.skipped + 1
        if len(self._examples) < _SHOWN and record not in self._examples:  # it comes again in every epoch
            self._examples.append(record)
            log.log(self._level, "source %r: skipped %s: %s", self._source, record.place, record.reason)
            if len(self._examples) == _SHOWN:
                log.log(self._level, "source %r: further skipped records are only counted", self._source)

    def check(self, *, complete: bool) -> None:
        """Stop when too much is bad; `complete`: all there is was read, so that even a few records are a share.

        Raises:
            DataError: More than `max_share` of the records had to be skipped.
        """
        if self.skipped <= self._max_share * self.seen or (self.seen < _MIN_RECORDS and not complete):
            return
        raise DataError(
            f"source {self._source!r}: {self.skipped} of {self.seen} records are bad, more than max_bad_share"
            f" {self._max_share}; mend or exclude them, or raise max_bad_share{self.examples()}"
        )

    def examples(self) -> str:
        """The first bad records, a line each."""
        return "".join(f"\n  {place}: {reason}" for place, reason in self._examples)
