"""Kind `hub`: a dataset that the `datasets` library streams, from the Hugging Face hub or a folder."""

import logging
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from app.errors import DataError
from datamodules.readers.chunks import stride
from datamodules.readers.files import FileList
from datamodules.readers.records import BadRecord, Document, JsonField, LostRecords, Record, fingerprint
from datamodules.readers.sources import Source

_log = logging.getLogger(__name__)

_BATCH_ROWS = 16  # several times as fast as single rows, while a damaged batch loses few


class HubReader:
    """A reader (`records.Reader`) whose chunks are shards, or every m-th record of a shard."""

    def __init__(self, source: Source, *, min_chunks: int) -> None:
        self._name, self._max_bytes = f"{source.path}[{source.split}]", source.max_bytes
        self._field = JsonField(source.field)
        builder, self._dataset, self._column = _open(source)
        num_shards = int(self._dataset.num_shards)
        self._stride = stride(num_shards, min_chunks=min_chunks, source=source.name, unit="shard")
        self.num_chunks = num_shards * self._stride
        chosen = repr((source.path, source.config_name, source.split, source.data_files)).encode()
        prefix, parts = _identify(source, builder)
        self.fingerprint = prefix + fingerprint(source, [chosen, *parts], num_shards, self._stride)

    def read(self, chunk: int, *, start: int = 0) -> Iterator[Record]:
        shard, first = divmod(chunk, self._stride)
        return islice(self._records(shard), first + start * self._stride, None, self._stride)

    def _records(self, shard: int) -> Iterator[Record]:
        location, number = f"{self._name}:shard {shard + 1}", 0
        part = self._dataset.shard(num_shards=self._dataset.num_shards, index=shard)
        try:
            # In a worker process iter(part) would give the whole shard to the first worker and none to the others.
            for batch in part.iter(_BATCH_ROWS):
                for value in batch[self._column]:
                    number += 1
                    yield self._record(f"{location}, record {number}", value)
        except Exception as error:  # any format, codec or network library may have raised it
            yield LostRecords(location, f"cannot be read on behind record {number}: {_reason(error)}")

    def _record(self, location: str, value: object) -> Record:
        text, problem = self._field.pick({self._column: value})
        if not problem and len(text.encode()) > self._max_bytes:
            problem = f"longer than {self._max_bytes} bytes"
        return BadRecord(location, problem) if problem else Document(location, text, origin=text)


def _identify(source: Source, builder: Any) -> tuple[str, Iterable[bytes]]:
    """Return what tells the dataset from a later state of it: a prefix for people to read, and what to hash."""
    root = Path(source.path or "")
    if not root.is_dir():
        commit = str(builder.hash)  # to which `datasets` resolved the revision
        _log.info("source %r: dataset %r at revision %s", source.name, source.path, commit)
        return f"{commit[:7]}-", [commit.encode()]
    found = {Path(file) for part in (builder.config.data_files or {}).values() for file in part}
    files = sorted(file for file in found if file.is_file())
    names = [os.fsencode(os.path.relpath(file, root)) for file in files]
    sizes = np.array([file.stat().st_size for file in files], dtype=np.int64)
    return "", FileList(root, pa.array(names, pa.large_binary()), sizes).digest_parts()


def _open(source: Source) -> tuple[Any, Any, str]:
    """Return the dataset's builder, the datasets.IterableDataset with only the column that is needed, and its name."""
    import datasets  # this takes a second, for which runs without a hub source need not wait

    where = f"source {source.name!r}: dataset {source.path!r}"
    try:
        # load_dataset(streaming=True) does the same, but does not tell which commit it found.
        builder = datasets.load_dataset_builder(
            source.path, source.config_name, data_files=list(source.data_files) or None, revision=source.revision
        )
        dataset = builder.as_streaming_dataset(split=source.split)
        columns = None if dataset.features is None else list(dataset.features)
    except Exception as error:  # the library and the network may raise anything
        raise DataError(
            f"{where} cannot be opened: {_reason(error)}; check path, config_name, split, revision and data_files,"
            " the network, and for private or gated ones `hf auth login`"
        ) from error
    column = source.field if columns and source.field in columns else source.field.split(".")[0]
    if columns is not None and column not in columns:
        raise DataError(f"{where} has no column {source.field!r}; it has {', '.join(columns)}; correct field")
    return builder, dataset.select_columns([column]), column


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    cause = f" ({_reason(error.__cause__)})" if isinstance(error.__cause__, Exception) else ""
    return f"{type(error).__name__}: {text[:300]}{cause}"
