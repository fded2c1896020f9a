"""Sources read as records, in chunks that come in any order and in constant memory.

A `Source` (`sources`) is opened as a `Reader`. The files of a local one are listed (`files`) and cut into chunks
(`chunks`); reading a chunk gives documents and bad records (`records`).
Tested by tests/unit/datamodules/readers/test_opening.py.
"""

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


def open_reader(source: Source, *, min_chunks: int) -> Reader:
    """Open `source`, which reads names, sizes and footers, but no documents.

    There are at least `min_chunks` chunks (1 or more), unless the source has fewer files (`files`) or bytes.
    DataError says that there is nothing to read, why, and what to do.
    """
    if source.kind == "hub":
        return HubReader(source, min_chunks=min_chunks)
    return FILE_READERS[source.kind](source, list_files(source), min_chunks=min_chunks)
