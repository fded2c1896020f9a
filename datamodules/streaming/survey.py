"""A look at a source before training: text to train a tokenizer on, and held-out documents.

Both come from anywhere in the corpus, in an order that depends on the corpus alone, so every rank of every run sees the
same. Little is read of a large corpus, and all of a small one.
"""

from __future__ import annotations

import logging
from typing import Literal

import numpy as np

from app.errors import DataError
from datamodules.readers.opening import open_reader
from datamodules.readers.records import BadRecord, Document
from datamodules.readers.sources import Source
from datamodules.streaming.bad_records import BadRecords

_log = logging.getLogger(__name__)

_Side = Literal["training", "held_out"]

_MAX_BYTES = 2_000_000_000  # read of a source in search of held-out documents
_MIN_DOCUMENTS = {"training": 4, "held_out": 64}  # no document counts for more than its share of so many


class Survey:
    """Texts of training documents and of held-out ones, read until there are enough of both or the source ends.

    Args:
        source: The source to read.
        training_bytes: Training text wanted; 0 for none.
        held_out_bytes: Held-out text wanted.
        validation_share: Share of documents that are held out.
        max_bad_share: Share of records that may be bad.

    Attributes:
        training: The training documents.

    Raises:
        DataError: There is no training document, or more than `max_bad_share` of the records are bad.
    """

    def __init__(
        self,
        source: Source,
        *,
        training_bytes: int,
        held_out_bytes: int,
        validation_share: float,
        max_bad_share: float,
    ) -> None:
        self._source, self._share = source, validation_share
        self._reader = open_reader(source, min_chunks=1)
        self._records = BadRecords(source.name, max_share=max_bad_share, quiet=True)  # the stream will log them
        self._chunks = np.random.default_rng(0).permutation(self._reader.num_chunks).tolist()  # left to read
        self._start = self._read = 0  # records read of the first of these chunks; characters read in all
        self._missing: dict[_Side, int] = {"training": max(1, training_bytes), "held_out": held_out_bytes}
        self._most = {side: 1 + count // _MIN_DOCUMENTS[side] for side, count in self._missing.items()}
        self._found: dict[_Side, list[str]] = {"training": [], "held_out": []}
        self.training = self._documents("training")
        if not self.training:
            lower = "all fell to validation; lower validation_share or"
            why = lower if self._found["held_out"] else "none could be read;"
            examples = self._records.examples()
            raise DataError(f"source {source.name!r}: no training document, {why} add documents{examples}")

    @property
    def held_out(self) -> list[str]:
        """The held-out documents; most are read when first asked for, so that a resumed run starts without them.

        Raises:
            DataError: More than `max_bad_share` of what was read for them is bad.
        """
        return self._documents("held_out")

    def _documents(self, side: _Side) -> list[str]:
        while self._chunks and self._missing[side] > 0:
            self._read_chunk(until=side)
        return self._found[side]

    def _read_chunk(self, *, until: _Side) -> None:
        """Read on to the end of the chunk, or to the last document that is wanted."""
        for item in self._reader.read(self._chunks[0], start=self._start):
            self._start += 1
            if isinstance(item, BadRecord):
                self._records.bad(item)
                continue
            self._records.good()
            self._take(item)
            if self._missing[until] <= 0:
                return
        self._records.chunks += 1
        self._chunks, self._start = self._chunks[1:], 0
        self._records.check(complete=not self._chunks)
        if self._read > _MAX_BYTES:
            _log.warning("source %r: few of its documents are held out; raise validation_share", self._source.name)
            self._chunks = []

    def _take(self, document: Document) -> None:
        self._read += len(document.text)
        side: _Side = "held_out" if document.is_held_out(share=self._share) else "training"
        if self._missing[side] > 0:
            self._found[side].append(document.text[: self._most[side]] if side == "training" else document.text)
            self._missing[side] -= min(len(document.text.encode()), self._most[side])
