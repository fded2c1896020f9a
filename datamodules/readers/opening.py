"""From a source to its reader."""

from __future__ import annotations

from datamodules.readers.files import list_files
from datamodules.readers.hub import HubReader
from datamodules.readers.line_files import LineReader
from datamodules.readers.parquet import ParquetReader
from datamodules.readers.records import Reader
from datamodules.readers.sources import Source, SourceKind
from datamodules.readers.whole_files import WholeFileReader

FILE_READERS: dict[SourceKind, type[WholeFileReader | LineReader | ParquetReader]] = {
    "stdlib_code": WholeFileReader,
    "stdlib_text": WholeFileReader,
    "files": WholeFileReader,
    "lines": LineReader,
    "jsonl": LineReader,
    "parquet": ParquetReader,
}


def open_reader(source: Source, *, min_chunks: int, seed: int = 0) -> Reader:
    """Open `source`, which reads names, sizes and footers, but no documents.

    Args:
        source: What to read.
        min_chunks: Least number of chunks, 1 or more; only a source with fewer files (`files`) or bytes has fewer.
        seed: Of the order in which files are put into chunks; 0 or more.

    Raises:
        DataError: There is nothing to read; the message names the source, the reason and what to do.
    """
    if source.kind == "hub":
        return HubReader(source, min_chunks=min_chunks)
    return FILE_READERS[source.kind](source, list_files(source), min_chunks=min_chunks, seed=seed)
