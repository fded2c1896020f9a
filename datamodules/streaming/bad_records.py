"""Bad records of a source: skipped, counted and logged with their locations, and an error when they are too many."""

import logging
import math

from app.errors import DataError
from datamodules.readers.records import BadRecord, Document, LostRecords, Record

_log = logging.getLogger(__name__)

_SHOWN = 20


class BadRecords:
    """Count the records of one source as one process reads them.

    Bad records often come together: a shard with the wrong field is several chunks. So as long as not everything has
    been read, bad records are judged as if they came by whole chunks, and only more of them than chance explains stop
    a run.

    At most `max_share` of the records, in [0, 1], may be bad. Those without any text are skipped but neither counted as
    bad nor logged: they are common (`__init__.py`) and no damage. `logged` are records that others in this process
    logged before.
    """

    def __init__(
        self, source: str, *, max_share: float, quiet: bool = False, logged: set[BadRecord] | None = None
    ) -> None:
        self.source, self._max_share, self._level = source, max_share, logging.DEBUG if quiet else logging.INFO
        self.chunks = 0  # read to their end so far
        self.seen = 0  # records read so far; lost records count as many as a chunk has on average
        self.skipped = self.failed = 0  # records skipped, and those of `seen` that count as bad
        self._logged = set() if logged is None else logged
        self._reasons: dict[str, tuple[str, int]] = {}  # first location and number of records

    def count(self, record: Record) -> Document | None:
        """Count a record, and return it if it is a document; the first bad ones are logged one by one."""
        if not isinstance(record, BadRecord):
            self.seen += 1
            return record
        weight = max(1, self.seen // max(1, self.chunks)) if isinstance(record, LostRecords) else 1
        self.seen, self.skipped = self.seen + weight, self.skipped + 1
        self.failed += 0 if record.is_empty else weight
        first, count = self._reasons.get(record.reason, (record.location, 0))
        if count or len(self._reasons) < _SHOWN:
            self._reasons[record.reason] = first, count + 1
        known = record.is_empty or record in self._logged  # it comes again in every epoch, to any lane
        if len(self._logged) < _SHOWN and not known:
            self._logged.add(record)
            _log.log(self._level, "source %r: skipped %s: %s", self.source, record.location, record.reason)
            if len(self._logged) == _SHOWN:
                _log.log(self._level, "source %r: further skipped records are only counted", self.source)
        return None

    def check(self, *, complete: bool) -> None:
        """Raise DataError when too much is bad; `complete` means that all was read, so that the share is exact."""
        allowed = self._max_share * self.seen
        if not complete:  # chance may bring three standard deviations more of bad chunks, and three chunks at once
            expected = self._max_share * self.chunks
            in_a_chunk = max(1, self.seen / max(1, self.chunks))  # a long line may fill many chunks without a record
            allowed += (3 * math.sqrt(expected) + 3) * in_a_chunk
        if self.failed > allowed:
            raise DataError(
                f"source {self.source!r}: {self.failed} of {self.seen} records are bad, more than max_bad_share"
                f" {self._max_share}; mend or exclude them, give a glob, or raise max_bad_share{self.examples()}"
            )

    def examples(self) -> str:
        """Return the first record skipped for each reason, a line each."""
        return "".join(
            f"\n  {location}: {reason}" + (f" (and {count - 1} more)" if count > 1 else "")
            for reason, (location, count) in self._reasons.items()
        )
