"""Kind `parquet`: a column, by row groups. Opening reads the footers; reading holds a batch of the one column."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from app.errors import DataError
from datamodules.readers.chunks import Groups, stride
from datamodules.readers.files import FileList
from datamodules.readers.fingerprint import fingerprint
from datamodules.readers.parquet_column import ColumnError, TextColumn
from datamodules.readers.records import BadRecord, LostRecords, Record
from datamodules.readers.sources import Document, Source
from datamodules.readers.streams import READ_ERRORS, decode, refuse_pointer, size_change, why

_BATCH_BYTES, _BATCH_ROWS = 1 << 20, 1024
_WHOLE_FILE = -1  # stands for the row groups of a file that could not be opened: it is one bad record
_ERRORS = (*READ_ERRORS, ColumnError)


class ParquetReader:
    """Chunks are groups of row groups, or every m-th row of one; see `datamodules.readers.records.Reader`."""

    def __init__(self, source: Source, files: FileList, *, min_chunks: int, seed: int) -> None:
        self._source, self._files, self._field, self._max_bytes = source, files, source.field, source.max_bytes
        # [num_units, 3]: file, row group, bytes
        units = np.array([unit for file in range(len(files)) for unit in self._units_of(file)], np.int64).reshape(-1, 3)
        if (units[:, 1] == _WHOLE_FILE).all():
            problem = self._problem(0) if len(units) else "they have no rows"
            what = f"none of {len(files)} files can be read, {files.name(0)}: " if len(units) else "nothing to read: "
            raise DataError(f"source {source.name!r} ({source.root}): {what}{problem}; correct its field or its files")
        self._units = units
        self._groups = Groups(units[:, 2], min_chunks=min_chunks, seed=seed)
        self._stride = stride(self._groups.num_chunks, min_chunks=min_chunks, source=source.name, unit="row group")
        self.num_chunks = self._groups.num_chunks * self._stride

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the source; see `datamodules.readers.records.Reader`."""
        layout = (self._units, self._groups.num_chunks, self._groups.order, self._stride)
        return fingerprint(self._source, self._files.digest_parts(), *layout)

    def read(self, chunk: int, *, start: int = 0) -> Iterator[Record]:
        """The records of `chunk` from index `start` on."""
        group, first = divmod(chunk, self._stride)
        rows = (row for unit in self._groups.units(group) for row in self._rows(*map(int, self._units[unit, :2])))
        return map(self._record, islice(rows, first + start * self._stride, None, self._stride))

    def _record(self, row: _Row | BadRecord) -> Record:
        if isinstance(row, BadRecord):
            return row
        raw = row.column[row.at].as_py()
        if raw is None:
            text, problem = "", f"column {self._field!r} is null"
        elif len(raw) > self._max_bytes:
            text, problem = "", f"longer than {self._max_bytes} bytes"
        else:
            text, problem = decode(raw)
        place = f"{row.file}:row {row.number}"
        return BadRecord(place, problem) if problem else Document(place, text, origin=text)

    def _units_of(self, file: int) -> list[tuple[int, int, int]]:
        try:
            with self._open(file) as (opened, column):
                groups = [opened.metadata.row_group(number) for number in range(opened.num_row_groups)]
                sizes = [column.num_bytes(group) for group in groups]
        except _ERRORS:
            return [(file, _WHOLE_FILE, 1)]
        return [(file, number, size) for number, size in enumerate(sizes) if groups[number].num_rows]

    def _rows(self, file: int, group: int) -> Iterator[_Row | BadRecord]:
        name = self._files.name(file)
        if group == _WHOLE_FILE:
            yield LostRecords(name, self._problem(file))
            return
        try:
            problem = size_change(self._files.path(file), int(self._files.sizes[file]))
            if not problem:
                with self._open(file) as (opened, column):
                    yield from _rows_of(opened, column, name, group)
        except _ERRORS as error:
            problem = why(error)
        if problem:
            yield LostRecords(name, f"row group {group + 1}: {problem}")

    def _problem(self, file: int) -> str:
        try:
            with self._open(file):
                return "could not be read when the source was opened"
        except _ERRORS as error:
            return why(error)

    @contextmanager
    def _open(self, file: int) -> Iterator[tuple[pq.ParquetFile, TextColumn]]:
        # With a buffer of its own, Arrow does not load whole row groups.
        path = self._files.path(file)
        with path.open("rb") as raw:
            refuse_pointer(raw)
            with pq.ParquetFile(raw, buffer_size=_BATCH_BYTES, pre_buffer=False) as opened:
                yield opened, TextColumn(opened, self._field)


class _Row(NamedTuple):
    """A value that is not decoded; `number` is its row in the file, from 1."""

    file: str
    number: int
    column: pa.LargeBinaryArray
    at: int


def _rows_of(opened: pq.ParquetFile, column: TextColumn, name: str, group: int) -> Iterator[_Row]:
    metadata = opened.metadata.row_group(group)
    rows = _BATCH_BYTES * metadata.num_rows // max(column.num_bytes(metadata), 1)
    number = sum(opened.metadata.row_group(before).num_rows for before in range(group))
    batches = opened.iter_batches(
        max(1, min(rows, _BATCH_ROWS)), row_groups=[group], columns=[column.field], use_threads=False
    )
    for batch in batches:
        values = column.values(batch)
        for at in range(len(values)):
            number += 1
            yield _Row(name, number, values, at)
