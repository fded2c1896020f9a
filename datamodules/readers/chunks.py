"""Files cut into chunks of about equal size: pure arithmetic over sizes.

Files come in a random order that is always the same, so that a chunk of small files mixes folders: the files of one
folder are alike, a chunk is read as a whole, and a shuffle buffer is small beside a corpus. Laid end to end in that
order, the files are cut at equal distances, either anywhere (`ByteRanges`) or only between files (`Groups`).
"""

import logging
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_log = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 20
_MAX_CHUNKS = 100_000


class ByteRange(NamedTuple):
    """Bytes `begin` to `end` - 1 of a file, which is given by its index."""

    file: int
    begin: int
    end: int


def chunk_count(total: int, *, min_chunks: int) -> int:
    """Return the number of chunks for `total` bytes: 1 MiB each, more in a huge corpus and less in a tiny one."""
    return max(min(-(-total // _CHUNK_BYTES), _MAX_CHUNKS), min_chunks)


class ByteRanges:
    """Chunks cut anywhere, of equally many bytes, give or take one; `sizes` [num_files] int64 are in bytes."""

    def __init__(self, sizes: np.ndarray, *, min_chunks: int) -> None:
        self.order = np.random.default_rng(0).permutation(len(sizes))
        self._ends = np.cumsum(sizes[self.order])
        self._total = int(self._ends[-1]) if len(sizes) else 0
        self.num_chunks = min(chunk_count(self._total, min_chunks=min_chunks), self._total)

    def ranges(self, chunk: int) -> Iterator[ByteRange]:
        begin, end = (self._total * number // self.num_chunks for number in (chunk, chunk + 1))
        index = int(np.searchsorted(self._ends, begin, side="right"))
        while begin < end:
            file_end = int(self._ends[index])
            file_begin = int(self._ends[index - 1]) if index else 0
            if file_begin < file_end:
                yield ByteRange(int(self.order[index]), begin - file_begin, min(end, file_end) - file_begin)
            begin, index = file_end, index + 1


class Groups:
    """Chunks cut only between units (files, row groups), no fewer than chunks; `costs` [num_units] int64, in bytes."""

    def __init__(self, costs: np.ndarray, *, min_chunks: int) -> None:
        self.order = np.random.default_rng(0).permutation(len(costs))
        ends = np.cumsum(costs[self.order])
        total = int(ends[-1]) if len(costs) else 0
        self.num_chunks = num_chunks = min(chunk_count(total, min_chunks=min_chunks), len(costs))
        number = np.arange(num_chunks)
        first = np.searchsorted(ends - costs[self.order], number * (total / max(num_chunks, 1)))
        first = np.maximum.accumulate(first - number) + number  # no chunk is empty: each begins behind the last one
        self._first = np.append(np.minimum(first, len(costs) - num_chunks + number), len(costs))

    def units(self, chunk: int) -> list[int]:
        return [int(unit) for unit in self.order[self._first[chunk] : self._first[chunk + 1]]]


def stride(num_units: int, *, min_chunks: int, source: str, unit: str) -> int:
    """Count the chunks that a unit is dealt to record by record: above 1 where units are fewer than chunks."""
    every = -(-min_chunks // num_units) if num_units else 1
    if every > 1:
        message = "source %r: %d %s(s) for %d lanes: each is read %d times over; more, smaller ones would read faster"
        _log.warning(message, source, num_units, unit, min_chunks, every)
    return every
