"""The endless stream of training rows of one lane: sources read, shuffled, tokenised, packed and mixed.

A run has V lanes, and a lane is what one worker process reads: a part of every source, disjoint from the parts of all
other lanes. Each source is cut into C chunks; the n-th to be read, n = 0, 1, 2, ..., is entry n mod C of the n // C-th
permutation of them, and lane l reads n = l, l + V, l + 2V, ... So every chunk is read exactly once an epoch by exactly
one lane, whatever V, and no lane waits for another.

Documents are shuffled in blocks: a lane reads about `shuffle_megabytes` of a source, from chunks that lie anywhere
in the corpus, and goes through them in random order; what they are packed into is shuffled once more, in windows of
half a million tokens, since a long document gives many rows. Everything is a function of the seed and of the place, so
a place is all that a checkpoint needs: ten integers for each source of a lane. A lane set to a place reads one block
and packs one window again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from app.errors import DataError
from datamodules.bad_records import BadRecords
from datamodules.packing import PACKINGS, LongDocuments, Packing, Row, Tokens
from datamodules.readers.records import BadRecord, Reader
from datamodules.sources import Source
from datamodules.tokenizers import Encoder

_CHUNK_KEY, _DOCUMENT_KEY, _ROW_KEY, _CREDIT_KEY = 0, 1, 2, 3  # keep the kinds of randomness independent
_WINDOW_TOKENS = 2**19  # that rows are shuffled among
_DOCUMENTS_A_CALL = 64  # of the tokenizer
_PATIENCE = 20  # passes without a document before a source counts as empty: a lane may meet the same chunks repeatedly


class Place(NamedTuple):
    """Where a lane stands in a source.

    Attributes:
        ordinal: Chunks of the lane read to their end when the block began.
        record: Records of the next chunk read when the block began.
        block: Blocks before this one.
        seen: Records read before this block.
        skipped: Of those, the ones that were skipped.
        failed: Of those, the ones that count as bad.
        taken: Documents of the block that are used up, in shuffled order.
        within: What is used up beyond them, in the packing's own unit.
        window: Windows of rows before this one.
        drawn: Rows of the window that were given out, in shuffled order; all else tells where the window begins.
    """

    ordinal: int = 0
    record: int = 0
    block: int = 0
    seen: int = 0
    skipped: int = 0
    failed: int = 0
    taken: int = 0
    within: int = 0
    window: int = 0
    drawn: int = 0


class LaneState(NamedTuple):
    """All of a lane.

    Attributes:
        places: Of each source, where its next row begins.
        tokens: Of each source, delivered so far, without padding.
        rows: Of each source, delivered so far.
        epochs: Of each source, passes over the lane's part of it; for information, as what follows.
        seen: Of each source, records read.
        skipped: Of each source, bad records among those.
    """

    places: tuple[Place, ...]
    tokens: tuple[int, ...]
    rows: tuple[int, ...]
    epochs: tuple[float, ...]
    seen: tuple[int, ...]
    skipped: tuple[int, ...]

    @classmethod
    def start(cls, num_sources: int) -> LaneState:
        """Of a lane that delivered nothing yet."""
        zeros = (0,) * num_sources
        return cls((Place(),) * num_sources, zeros, zeros, (0.0,) * num_sources, zeros, zeros)

    def plain(self) -> list[list[Any]]:
        """As lists of numbers, for a checkpoint."""
        return [[list(place) for place in self.places], *map(list, self[1:])]

    @classmethod
    def of(cls, plain: list[list[Any]]) -> LaneState:
        """From what `plain` gave."""
        places, *figures = plain
        return cls(tuple(Place(*place) for place in places), *map(tuple, figures))


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """What the rows of a stream depend on, beside its sources.

    Attributes:
        seq_len: S, tokens a row.
        packing: How documents become rows.
        long_documents: What becomes of a document longer than a row: its further tokens go into further rows, or go.
        shuffle_megabytes: Text of a source that a lane holds to shuffle it; 0 keeps the order of records in a chunk.
        validation_share: Share of documents held out, which are not in the stream.
        max_bad_share: Share of records of a source that may be bad.
        seed: Of every order.
        num_lanes: V.
    """

    seq_len: int
    packing: Packing
    long_documents: LongDocuments
    shuffle_megabytes: float
    validation_share: float
    max_bad_share: float
    seed: int
    num_lanes: int


class SourceStream:
    """The rows of one source in one lane.

    Args:
        source: Named source.
        reader: Of its records.
        index: Place of the source among all.
        lane: 0..V-1.
        encode: Texts to token ids.
        settings: Of the stream.
        place: Where to begin.
    """

    def __init__(
        self,
        source: Source,
        reader: Reader,
        *,
        index: int,
        lane: int,
        encode: Encoder,
        settings: StreamSettings,
        place: Place,
    ) -> None:
        self._source, self._reader, self._index, self._lane = source, reader, index, lane
        self._encode, self._settings = encode, settings
        self._chunks = lru_cache(maxsize=2)(self._draw_chunks)
        self._start = self._next_start = place  # of the window, and of the row after the latest that was packed
        self._window: list[Row] = []
        self._drawn = place.drawn
        self._places: list[Place] = []  # of the documents that the packing was given and has not finished
        self._following, self._block_documents = place, 0  # of the block that is read: what comes next, and its size
        self._last = place  # document given to the packing
        self._finished = 0  # documents that the packing has finished
        self._records = BadRecords(source.name, max_share=settings.max_bad_share)
        self._open: Iterator[Any] = iter(())  # the chunk that is being read
        self._open_at: tuple[int, int] | None = None  # ordinal and record that it stands at
        rows = PACKINGS[settings.packing]
        self._rows = rows(self._documents(), seq_len=settings.seq_len, within=place.within)

    @property
    def epochs(self) -> float:
        """Passes over the lane's part of the source that are packed; within a block, in proportion to its documents."""
        at, following = self._next_start, self._following
        through = at.taken / self._block_documents if following.block > at.block else 0.0
        ordinal = at.ordinal + through * (following.ordinal - at.ordinal)
        return ordinal * self._settings.num_lanes / self._reader.num_chunks

    @property
    def records(self) -> tuple[int, int]:
        """Records read so far, and bad ones among them."""
        return self._records.seen, self._records.skipped

    def next_row(self) -> Row:
        """The next row; `place` is then where the one after it begins.

        Raises:
            DataError: Nothing usable is left in the source, or too much of it is bad.
        """
        if not self._window:
            self._fill_window()
        row = self._window[self._drawn]
        self._drawn += 1
        if self._drawn == len(self._window):
            self._start, self._window, self._drawn = self._next_start._replace(window=self._start.window + 1), [], 0
        return row

    @property
    def place(self) -> Place:
        """Where the next row comes from."""
        return self._start._replace(drawn=self._drawn)

    def _fill_window(self) -> None:
        """Pack the rows of a window, of one block alone, and shuffle them: a long document gives many in a row."""
        size = max(1, _WINDOW_TOKENS // self._settings.seq_len)
        row, block = self._pack_row()
        rows = [row]
        while len(rows) < size and self._next_start.block == block and self._next_start.taken < self._block_documents:
            rows.append(self._pack_row()[0])
        if self._settings.shuffle_megabytes > 0:
            order = self._generator(_ROW_KEY, self._lane, self._start.window).permutation(len(rows))
            rows = [rows[index] for index in order]
        self._window = rows

    def _pack_row(self) -> tuple[Row, int]:
        """The next row in order, and the block in which it begins."""
        packed = next(self._rows)
        begins_in = self._places[0].block
        del self._places[: packed.finished - self._finished]
        self._finished = packed.finished
        if self._places:
            self._next_start = self._places[0]._replace(within=packed.within)
        else:
            self._next_start = self._last._replace(taken=self._last.taken + 1, within=0)
        return packed.row, begins_in

    def _documents(self) -> Iterator[Tokens | None]:
        """Token ids of the documents from `place` on, and None at the end of each block."""
        place = self._start._replace(drawn=0)
        while True:
            texts, following = self._read_block(place)
            self._following, self._block_documents = following, len(texts)
            order = self._generator(_DOCUMENT_KEY, self._lane, place.block).permutation(len(texts))
            for start in range(place.taken, len(order), _DOCUMENTS_A_CALL):
                indices = order[start : start + _DOCUMENTS_A_CALL]
                for taken, ids in enumerate(self._encode([texts[index] for index in indices]), start):
                    self._last = place._replace(taken=taken, within=0)
                    self._places.append(self._last)
                    yield ids[: self._settings.seq_len] if self._settings.long_documents == "truncate" else ids
            yield None
            place = following

    def _read_block(self, place: Place) -> tuple[list[str], Place]:
        """Training documents of the block that begins at `place`, and where the next one begins.

        A block ends with the epoch, so that a small corpus is not read many times to fill it.
        """
        limit = self._settings.shuffle_megabytes * 1e6
        texts: list[str] = []
        size, ordinal, record, barren = 0, place.ordinal, place.record, 0
        records = self._records
        records.chunks, records.seen, records.skipped, records.failed = ordinal, place.seen, place.skipped, place.failed
        while True:
            complete = True
            for item in self._chunk_from(ordinal, record):
                record += 1
                if isinstance(item, BadRecord):
                    records.bad(item)
                    continue
                records.good()
                if item.is_held_out(share=self._settings.validation_share):
                    continue
                texts.append(item.text)
                size += len(item.text)
                if size >= limit:
                    complete = False
                    break
            self._open_at = (ordinal, record)
            if complete:
                ordinal, record, barren = ordinal + 1, 0, barren + 1
                records.chunks = ordinal
            records.check(complete=ordinal >= self._reader.num_chunks)
            if texts and (not complete or self._epoch(ordinal) > self._epoch(ordinal - 1)):
                counts = (records.seen, records.skipped, records.failed)
                return texts, Place(ordinal, record, place.block + 1, *counts)
            if not texts and barren > _PATIENCE * self._reader.num_chunks:
                raise DataError(
                    f"source {self._source.name!r}: no usable training document in {records.seen} records;"
                    f" add documents or lower validation_share{records.examples()}"
                )

    def _chunk_from(self, ordinal: int, record: int) -> Iterator[Any]:
        """Records of the lane's `ordinal`-th chunk from `record` on; goes on where the last block stopped."""
        if record == 0 or self._open_at != (ordinal, record):
            number = self._lane + ordinal * self._settings.num_lanes
            epoch, entry = divmod(number, self._reader.num_chunks)
            self._open = iter(self._reader.read(int(self._chunks(epoch)[entry]), start=record))
        return self._open

    def _epoch(self, ordinal: int) -> int:
        return (self._lane + ordinal * self._settings.num_lanes) // self._reader.num_chunks

    def _draw_chunks(self, epoch: int) -> npt.NDArray[np.int64]:
        return self._generator(_CHUNK_KEY, epoch).permutation(self._reader.num_chunks)

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self._settings.seed, spawn_key=(self._index, *key)))


class Lane:
    """The endless mixture of all sources in one lane: of the sources, the one that is furthest behind gives a row.

    So the tokens delivered keep to the weights, to within a row of each source, at any time.

    Args:
        sources: Each with its reader.
        lane: 0..V-1.
        encode: Texts to token ids.
        settings: Of the stream.
        state: Where to begin.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Source, Reader]],
        *,
        lane: int,
        encode: Encoder,
        settings: StreamSettings,
        state: LaneState,
    ) -> None:
        self._streams = [
            SourceStream(source, reader, index=index, lane=lane, encode=encode, settings=settings, place=place)
            for index, ((source, reader), place) in enumerate(zip(sources, state.places, strict=True))
        ]
        self._weights = [source.weight for source, _ in sources]
        self._tokens, self._rows = list(state.tokens), list(state.rows)
        # Up to a row in advance, or all lanes would take their first row, and many later ones, from the same source.
        credit = np.random.default_rng(np.random.SeedSequence(settings.seed, spawn_key=(lane, _CREDIT_KEY)))
        self._credit = credit.uniform(0.0, settings.seq_len, size=len(sources))

    def next_row(self) -> tuple[int, Row]:
        """The index of a source, and its next row."""
        behind = [
            (tokens + credit) / weight
            for tokens, credit, weight in zip(self._tokens, self._credit, self._weights, strict=True)
        ]
        source = int(np.argmin(behind))
        row = self._streams[source].next_row()
        self._tokens[source] += row.num_tokens
        self._rows[source] += 1
        return source, row

    @property
    def state(self) -> LaneState:
        """Where the next row comes from."""
        streams = self._streams
        seen, skipped = zip(*(stream.records for stream in streams), strict=True)
        return LaneState(
            places=tuple(stream.place for stream in streams),
            tokens=tuple(self._tokens),
            rows=tuple(self._rows),
            epochs=tuple(stream.epochs for stream in streams),
            seen=seen,
            skipped=skipped,
        )
