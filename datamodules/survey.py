"""A look at a source before training: text to train a tokenizer on, and held-out documents.

Both come from anywhere in the corpus, in an order that depends on the corpus alone: every rank of every run sees the
same. Little is read of a large corpus, all of a small one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from app.errors import DataError
from datamodules.bad_records import BadRecords
from datamodules.packing import Row, Tokens, split_rows
from datamodules.readers import BadRecord, open_reader
from datamodules.sources import Source

log = logging.getLogger(__name__)

_MAX_BYTES = 2_000_000_000  # read of a source in search of held-out documents
_MIN_DOCUMENTS = {"training": 4, "held_out": 64}  # lest a long one be all there is, none counts for more than its share
_MAX_ROWS_A_DOCUMENT = 4


@dataclass(frozen=True)
class Survey:
    """Texts of training documents and of held-out ones, none of them in both."""

    training: list[str]
    held_out: list[str]


def survey(
    source: Source, *, training_bytes: int, held_out_bytes: int, validation_share: float, max_bad_share: float
) -> Survey:
    """Read documents until there is enough of both, or nothing more.

    Args:
        source: To read.
        training_bytes: Training text wanted; 0 for none.
        held_out_bytes: Held-out text wanted.
        validation_share: Share of documents that are held out.
        max_bad_share: Share of records that may be bad.

    Raises:
        DataError: There is no training document, or more than `max_bad_share` of the records are bad.
    """
    reader, found = open_reader(source, min_chunks=1), Survey([], [])
    records = BadRecords(source.name, max_share=max_bad_share, quiet=True)  # the stream will log them
    missing, read = {"training": max(1, training_bytes), "held_out": held_out_bytes}, 0
    most = {side: 1 + count // _MIN_DOCUMENTS[side] for side, count in missing.items()}
    for chunk in np.random.default_rng(0).permutation(reader.num_chunks):
        for item in reader.read(int(chunk)):
            if isinstance(item, BadRecord):
                records.bad(item)
                continue
            records.good()
            read += len(item.text)
            side = "held_out" if item.is_held_out(share=validation_share) else "training"
            if missing[side] > 0:
                getattr(found, side).append(item.text[: most[side]] if side == "training" else item.text)
                missing[side] -= min(len(item.text.encode()), most[side])
            if max(missing.values()) <= 0:
                return found
        records.chunks += 1
        records.check(complete=False)
        if read > _MAX_BYTES:
            log.warning("source %r: few of its documents are held out; raise validation_share", source.name)
            return found
    records.check(complete=True)
    if not found.training:
        why = "all fell to validation; lower validation_share or" if found.held_out else "none could be read;"
        raise DataError(f"source {source.name!r}: no training document, {why} add documents{records.examples()}")
    return found


def spread_rows(documents: Sequence[Tokens], *, seq_len: int, num_rows: int) -> list[Row]:
    """At most `num_rows` rows of `seq_len` tokens, spread evenly over the documents; long documents give their head."""
    heads = (document[: _MAX_ROWS_A_DOCUMENT * seq_len] for document in documents)
    rows = [packed.row for packed in split_rows(heads, seq_len=seq_len)]
    count = min(num_rows, len(rows))
    return [rows[index * len(rows) // count] for index in range(count)]
