"""The documents of one source in one lane, read in blocks and shuffled within each block.

Each source is cut into C chunks. The n-th to be read, n = 0, 1, 2, ..., is entry n mod C of the (n // C)-th permutation
of them, and lane l of V reads n = l, l + V, l + 2V, ... So every chunk is read exactly once an epoch by exactly one
lane, whatever V is, and no lane waits for another.

A block is about `shuffle_megabytes` of text, from chunks that lie anywhere in the corpus. Its order is a function of
the seed and of its number, so the position at which it begins is enough to read it again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from app.errors import ConfigError, DataError, check_choice, check_range
from datamodules.loading.datamodule import RowSettings
from datamodules.readers.records import Reader
from datamodules.streaming.bad_records import BadRecords
from datamodules.streaming.packing import PACKINGS, LongDocuments, Packing

_CHUNK_KEY, _DOCUMENT_KEY = 0, 1  # kinds of randomness; stream has others
_PATIENCE = 20  # passes without a document before a source counts as empty: a lane may meet the same chunks repeatedly


# What the order of training rows depends on, beside the sources.
ORDER_SETTINGS = (
    *("seq_len", "packing", "long_documents", "shuffle_megabytes", "validation_share", "max_bad_share", "seed"),
    *("num_lanes", "batch_size"),
)


@dataclass(frozen=True, kw_only=True)
class StreamSettings(RowSettings):
    """Settings of a stream, checked; see `TextCodeDataModule`. `num_lanes` is V, 0 as long as no trainer is known."""

    packing: Packing
    long_documents: LongDocuments
    shuffle_megabytes: float
    validation_share: float
    num_lanes: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("packing", self.packing, PACKINGS)
        check_choice("long_documents", self.long_documents, get_args(LongDocuments))
        check_range("shuffle_megabytes", self.shuffle_megabytes, low=0, high=float("inf"), high_open=True)
        if not 0 < self.validation_share < 1:
            raise ConfigError("validation_share", got=self.validation_share, allowed="(0, 1)")

    def generator(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))


class SourcePosition(NamedTuple):
    """Where a lane stands in a source; checkpoints hold the fields in this order."""

    ordinal: int = 0  # chunks of the lane read to their end when the block began
    record: int = 0  # records of the next chunk read when the block began
    block: int = 0  # blocks before this one
    seen: int = 0  # records read before this block
    skipped: int = 0  # records among them that were skipped
    failed: int = 0  # records among them that count as bad
    taken: int = 0  # documents of the block that are used up, in shuffled order
    within: int = 0  # what is used up beyond them, in the packing's own unit
    window: int = 0  # windows of rows before this one
    drawn: int = 0  # rows of the window that were given out, in shuffled order; all else tells where the window begins


class Block(NamedTuple):
    """Training documents that were shuffled together, where they begin, and where the next block does."""

    start: SourcePosition
    texts: list[str]
    following: SourcePosition


class SourceBlocks:
    """Read the blocks of the source of this index in a lane, and count in `records` what was read so far."""

    def __init__(self, reader: Reader, *, index: int, lane: int, settings: StreamSettings, records: BadRecords) -> None:
        self._reader, self.index, self.lane, self.settings, self.records = reader, index, lane, settings, records
        self._order = lru_cache(maxsize=1)(self._draw_order)

    def read(self, start: SourcePosition) -> Iterator[Block]:
        """Yield the block that `start` lies in and all that follow, without end.

        A block ends with the epoch, so that a small corpus is not read many times to fill it. DataError says that
        nothing usable is in the source, or too much of it is bad.
        """
        records = self.records
        records.seen, records.skipped, records.failed = start.seen, start.skipped, start.failed
        records.chunks, record = start.ordinal, start.record
        limit = self.settings.shuffle_megabytes * 1e6
        texts: list[str] = []
        size = 0
        while True:
            epoch, entry = self._turn(records.chunks)
            chunk = self._reader.read(int(self._order(epoch)[entry]), start=record)
            for read, item in enumerate(chunk, record + 1):
                document = records.count(item)
                if document is None or document.is_held_out(share=self.settings.validation_share):
                    continue
                texts.append(document.text)
                size += len(document.text)
                if size >= limit:
                    yield (block := self._block(start, texts, read))
                    start, texts, size = block.following, [], 0
            records.chunks, record = records.chunks + 1, 0
            if texts and self._turn(records.chunks)[0] > epoch:
                yield (block := self._block(start, texts, record))
                start, texts, size = block.following, [], 0
            self._check()
            if not texts and records.chunks - start.ordinal > _PATIENCE * self._reader.num_chunks:
                raise DataError(
                    f"source {records.source!r}: no usable training document in {records.seen} records;"
                    f" add documents or lower validation_share{records.examples()}"
                )

    def epochs(self, ordinal: float) -> float:
        """Count the passes over the lane's part of the source that `ordinal` chunks make."""
        return ordinal * self.settings.num_lanes / self._reader.num_chunks

    def _block(self, start: SourcePosition, texts: list[str], record: int) -> Block:
        """Return the block of all that was read since `start`, up to `record` of the chunk that is being read."""
        self._check()
        seen = self.records
        following = SourcePosition(seen.chunks, record, start.block + 1, seen.seen, seen.skipped, seen.failed)
        order = self.settings.generator(self.index, _DOCUMENT_KEY, self.lane, start.block).permutation(len(texts))
        return Block(start, [texts[index] for index in order], following)

    def _check(self) -> None:
        # Each of several lanes has a random part of the chunks in every epoch, some of them often and others never.
        alone = self.settings.num_lanes == 1
        self.records.check(complete=alone and self.records.chunks >= self._reader.num_chunks)

    def _turn(self, ordinal: int) -> tuple[int, int]:
        """Return the epoch of the lane's `ordinal`-th chunk, and its index in the order of that epoch."""
        return divmod(self.lane + ordinal * self.settings.num_lanes, self._reader.num_chunks)

    def _draw_order(self, epoch: int) -> npt.NDArray[np.int64]:
        return self.settings.generator(self.index, _CHUNK_KEY, epoch).permutation(self._reader.num_chunks)
