"""One column of text in a Parquet file: where it is in the schema, and its values in a batch."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

_TEXT = {pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()}


class ColumnError(ValueError):
    """A file has no such column, or it does not hold text."""


class TextColumn:
    """A column that was found in a file.

    Args:
        file: The file.
        field: Name of the column; `a.b` also for `b` in a struct `a`, if there is no column `a.b`.

    Raises:
        ColumnError: It is not there, or it is not text.
    """

    def __init__(self, file: pq.ParquetFile, field: str) -> None:
        self.field = field
        schema: pa.Schema = file.schema_arrow
        self._path = [field] if field in schema.names else field.split(".")
        kind = pa.struct(list(schema))
        for key in self._path:
            index = kind.get_field_index(key) if pa.types.is_struct(kind) else -1  # -1 also if there are two
            if index < 0:
                raise ColumnError(f"no column {field!r}; it has {', '.join(map(repr, schema.names[:20]))}")
            kind = kind.field(index).type
        self._is_dictionary = pa.types.is_dictionary(kind)
        if (kind.value_type if self._is_dictionary else kind) not in _TEXT:
            raise ColumnError(f"column {field!r} is {kind}, not text")
        self._leaf = next(i for i in range(len(file.schema)) if file.schema.column(i).path == field)

    def num_bytes(self, group: pq.RowGroupMetaData) -> int:
        """Bytes of the column in a row group, uncompressed."""
        return int(group.column(self._leaf).total_uncompressed_size)

    def values(self, batch: pa.RecordBatch) -> pa.LargeBinaryArray:
        """The texts of a batch as bytes, which may be wrong UTF-8."""
        column = batch.column(self._path[0])
        for key in self._path[1:]:
            column = pc.struct_field(column, key)
        return (column.dictionary_decode() if self._is_dictionary else column).cast(pa.large_binary())
