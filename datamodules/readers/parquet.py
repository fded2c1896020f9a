"""Kind `parquet`: one column, by row groups. Opening reads the footers; reading holds a batch of the column."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import chain, islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from app.errors import DataError
from datamodules.readers.chunks import Groups, stride
from datamodules.readers.files import FileList
from datamodules.readers.records import (
    READ_ERRORS,
    BadRecord,
    Document,
    LostRecords,
    Record,
    decode,
    fingerprint,
    refuse_pointer,
    size_change,
    why_unreadable,
)
from datamodules.readers.sources import Source

_BATCH_BYTES, _BATCH_ROWS = 1 << 20, 1024
_WHOLE_FILE = -1  # stands for the row groups of a file that could not be opened
_TEXT = {pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()}


class ParquetReader:
    """A reader (`records.Reader`) whose chunks are groups of row groups, or every m-th row of a group."""

    def __init__(self, source: Source, files: FileList, *, min_chunks: int) -> None:
        self._source, self._files = source, files
        self._unreadable: dict[int, str] = {}  # why, by file
        # [num_units, 3]: file, row group, bytes
        units = np.array([unit for file in range(len(files)) for unit in self._units_of(file)], np.int64).reshape(-1, 3)
        if len(units) == len(self._unreadable):
            what = "nothing to read: they have no rows"
            if self._unreadable:
                file, problem = next(iter(self._unreadable.items()))
                what = f"none of {len(files)} files can be read, {files.name(file)}: {problem}"
            raise DataError(f"source {source.name!r} ({source.root}): {what}; correct its field or its files")
        self._units = units
        self._groups = Groups(units[:, 2], min_chunks=min_chunks)
        self._stride = stride(self._groups.num_chunks, min_chunks=min_chunks, source=source.name, unit="row group")
        self.num_chunks = self._groups.num_chunks * self._stride

    @cached_property
    def fingerprint(self) -> str:
        layout = (self._units, self._groups.num_chunks, self._groups.order, self._stride)
        return fingerprint(self._source, self._files.digest_parts(), *layout)

    def read(self, chunk: int, *, start: int = 0) -> Iterator[Record]:
        group, first = divmod(chunk, self._stride)
        rows = (row for unit in self._groups.units(group) for row in self._rows(*map(int, self._units[unit, :2])))
        return map(self._record, islice(rows, first + start * self._stride, None, self._stride))

    def _record(self, row: tuple[str, pa.Scalar] | BadRecord) -> Record:
        if isinstance(row, BadRecord):
            return row
        value: Any
        location, value = row
        raw = value.as_py()
        if raw is None:
            text, problem = "", f"column {self._source.field!r} is null"
        elif len(raw) > self._source.max_bytes:
            text, problem = "", f"longer than {self._source.max_bytes} bytes"
        else:
            text, problem = decode(raw)
        return BadRecord(location, problem) if problem else Document(location, text, origin=text)

    def _units_of(self, file: int) -> list[tuple[int, int, int]]:
        try:
            with self._open(file) as (opened, column):
                groups = [opened.metadata.row_group(number) for number in range(opened.num_row_groups)]
                sizes = [column.num_bytes(group) for group in groups]
        except READ_ERRORS as error:
            self._unreadable[file] = why_unreadable(error)
            return [(file, _WHOLE_FILE, 1)]
        return [(file, number, size) for number, size in enumerate(sizes) if groups[number].num_rows]

    def _rows(self, file: int, group: int) -> Iterator[tuple[str, pa.Scalar] | BadRecord]:
        """Yield the location of each row and its value, which is not decoded."""
        name = self._files.name(file)
        if group == _WHOLE_FILE:
            yield LostRecords(name, self._unreadable[file])
            return
        try:
            if change := size_change(self._files.path(file), int(self._files.sizes[file])):
                yield LostRecords(name, f"row group {group + 1}: {change}")
                return
            with self._open(file) as (opened, column):
                number = sum(opened.metadata.row_group(before).num_rows for before in range(group))
                values = chain.from_iterable(column.values(batch) for batch in _batches(opened, column, group))
                yield from ((f"{name}:row {row}", value) for row, value in enumerate(values, number + 1))
        except READ_ERRORS as error:
            yield LostRecords(name, f"row group {group + 1}: {why_unreadable(error)}")

    @contextmanager
    def _open(self, file: int) -> Iterator[tuple[pq.ParquetFile, "_TextColumn"]]:
        with self._files.path(file).open("rb") as raw:
            refuse_pointer(raw)
            # With a buffer of its own, Arrow does not load whole row groups.
            with pq.ParquetFile(raw, buffer_size=_BATCH_BYTES, pre_buffer=False) as opened:
                yield opened, _TextColumn(opened, self._source.field)


def _batches(opened: pq.ParquetFile, column: "_TextColumn", group: int) -> Iterator[pa.RecordBatch]:
    metadata = opened.metadata.row_group(group)
    rows = _BATCH_BYTES * metadata.num_rows // max(column.num_bytes(metadata), 1)
    size = max(1, min(rows, _BATCH_ROWS))
    yield from opened.iter_batches(size, row_groups=[group], columns=[column.field], use_threads=False)


class _TextColumn:
    """A column of text in a file; `a.b` also means `b` in a struct `a`, if there is no column `a.b`."""

    def __init__(self, file: pq.ParquetFile, field: str) -> None:
        self.field = field
        schema: pa.Schema = file.schema_arrow
        self._path = [field] if field in schema.names else field.split(".")
        kind = pa.struct(list(schema))
        for key in self._path:
            index = kind.get_field_index(key) if pa.types.is_struct(kind) else -1  # -1 also if there are two
            if index < 0:
                raise pa.ArrowInvalid(f"no column {field!r}; it has {', '.join(map(repr, schema.names[:20]))}")
            kind = kind.field(index).type
        self._is_dictionary = pa.types.is_dictionary(kind)
        if (kind.value_type if self._is_dictionary else kind) not in _TEXT:
            raise pa.ArrowInvalid(f"column {field!r} is {kind}, not text")
        self._leaf = next(i for i in range(len(file.schema)) if file.schema.column(i).path == field)

    def num_bytes(self, group: pq.RowGroupMetaData) -> int:
        """Return the bytes of the column in a row group, uncompressed."""
        return int(group.column(self._leaf).total_uncompressed_size)

    def values(self, batch: pa.RecordBatch) -> pa.LargeBinaryArray:
        """Return the texts of a batch as bytes, which need not be UTF-8."""
        column = batch.column(self._path[0])
        for key in self._path[1:]:
            column = pc.struct_field(column, key)
        return (column.dictionary_decode() if self._is_dictionary else column).cast(pa.large_binary())
