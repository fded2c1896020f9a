"""The endless stream of training rows of one lane: the rows of all its sources, mixed by weight.

The documents of each source are tokenised and packed into rows. A long document gives many rows, so rows are shuffled
once more, in windows of half a million tokens of one block.

Everything is a function of the seed and of the position, so a checkpoint holds ten integers for each source of a lane.
A lane set to a position reads one block and packs one window of rows again.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from app.protocols import SourceStatistics
from datamodules.loading.tokenizers import Encoder
from datamodules.readers.records import BadRecord, Reader
from datamodules.readers.sources import Source
from datamodules.streaming.bad_records import BadRecords
from datamodules.streaming.packing import PACKINGS, Row, Tokens
from datamodules.streaming.source_blocks import SourceBlocks, SourcePosition, StreamSettings

_ROW_KEY, _CREDIT_KEY = 2, 3  # kinds of randomness; source_blocks has others
_WINDOW_TOKENS = 2**19  # rows are shuffled among so many tokens
_DOCUMENTS_A_CALL = 64  # given to the tokenizer at once


class SourceState(NamedTuple):
    """Where the next row of a source begins in a lane, and what the source gave to the lane so far.

    Only `tokens` and `rows` decide on rows to come; the rest of `given` is for information.
    """

    position: SourcePosition = SourcePosition()
    given: SourceStatistics = SourceStatistics(tokens=0, rows=0, epochs=0.0, seen=0, skipped=0)


LaneState = tuple[SourceState, ...]  # by source


def to_lists(state: LaneState) -> list[list[Any]]:
    """Return the state for a checkpoint: the positions in the sources, and a list of each figure."""
    figures = zip(*(source.given for source in state), strict=True)
    return [[list(source.position) for source in state], *map(list, figures)]


def from_lists(lists: list[list[Any]]) -> LaneState:
    """Undo `to_lists`."""
    rows = zip(*lists, strict=True)
    return tuple(SourceState(SourcePosition(*position), SourceStatistics(*given)) for position, *given in rows)


class SourceStream:
    """The rows of one source in one lane, from a state on."""

    def __init__(self, blocks: SourceBlocks, state: SourceState, *, encode: Encoder) -> None:
        self._blocks, self._encode, self._settings = blocks, encode, blocks.settings
        self.tokens, self._num_rows, position = state.given.tokens, state.given.rows, state.position
        # Where the window begins, and the row after the latest one that was packed.
        self._start = self._next_start = position
        self._window: list[Row] = []
        self._drawn = position.drawn
        self._unfinished: list[SourcePosition] = []  # documents that the packing was given and has not finished
        self._finished = 0  # documents that the packing has finished
        self._last = position  # of the document that the packing was given last
        self._extents: dict[int, tuple[int, int]] = {}  # chunks and documents of each block that is in use
        pack = PACKINGS[self._settings.packing]
        self._rows = pack(self._documents(position), seq_len=self._settings.seq_len, within=position.within)

    @property
    def state(self) -> SourceState:
        """Where the next row comes from, and what was given out so far."""
        epochs = self._passes(self._start)
        if self._window:
            epochs += (self._passes(self._next_start) - epochs) * self._drawn / len(self._window)
        records = self._blocks.records
        given = SourceStatistics(self.tokens, self._num_rows, epochs, records.seen, records.skipped)
        return SourceState(self._start._replace(drawn=self._drawn), given)

    def _passes(self, position: SourcePosition) -> float:
        """Count the passes up to a position; within a block, in proportion to its documents."""
        chunks, documents = self._extents.get(position.block, (0, 1))
        return self._blocks.epochs(position.ordinal + chunks * position.taken / documents)

    def next_row(self) -> Row:
        """Return the next row and advance `state`; DataError as of `SourceBlocks.read`."""
        if not self._window:
            self._window = self._pack_window()
        row = self._window[self._drawn]
        self._drawn += 1
        self.tokens, self._num_rows = self.tokens + row.num_tokens, self._num_rows + 1
        if self._drawn == len(self._window):
            self._start, self._window, self._drawn = self._next_start._replace(window=self._start.window + 1), [], 0
        return row

    def _pack_window(self) -> list[Row]:
        """Return the rows of a window, all of which begin in one block, shuffled."""
        size = _WINDOW_TOKENS // self._settings.seq_len
        row, block = self._pack_row()
        rows = [row]
        _, documents = self._extents[block]
        while len(rows) < size and self._next_start.block == block and self._next_start.taken < documents:
            rows.append(self._pack_row()[0])
        if self._settings.shuffle_megabytes == 0:
            return rows
        key = (self._blocks.index, _ROW_KEY, self._blocks.lane, self._start.window)
        return [rows[index] for index in self._settings.generator(*key).permutation(len(rows))]

    def _pack_row(self) -> tuple[Row, int]:
        """Return the next row in order, and the block in which it begins."""
        packed = next(self._rows)
        block = self._unfinished[0].block
        del self._unfinished[: packed.finished - self._finished]
        self._finished = packed.finished
        if self._unfinished:
            self._next_start = self._unfinished[0]._replace(within=packed.within)
        else:
            self._next_start = self._last._replace(taken=self._last.taken + 1, within=0)
        return packed.row, block

    def _documents(self, position: SourcePosition) -> Iterator[Tokens | None]:
        """Yield the token ids of each document from `position` on, and None at the end of each block."""
        for start, texts, following in self._blocks.read(position):
            in_use = {block: extent for block, extent in self._extents.items() if block >= self._start.block}
            self._extents = in_use | {start.block: (following.ordinal - start.ordinal, len(texts))}
            for first in range(start.taken, len(texts), _DOCUMENTS_A_CALL):
                for taken, ids in enumerate(self._encode(texts[first : first + _DOCUMENTS_A_CALL]), first):
                    self._last = start._replace(taken=taken)
                    self._unfinished.append(self._last)
                    yield ids[: self._settings.seq_len] if self._settings.long_documents == "truncate" else ids
            yield None


class Lane:
    """The endless mixture of all sources in one lane: the source that is furthest behind its weight gives a row.

    So the tokens delivered keep to the weights, to within a row of each source, at any time. The lane begins at
    `state`. `logged` holds for each source the bad records that were logged before; all lanes of a process share them.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Source, Reader]],
        *,
        lane: int,
        encode: Encoder,
        settings: StreamSettings,
        state: LaneState,
        logged: Sequence[set[BadRecord]] | None = None,
    ) -> None:
        self._streams: list[SourceStream] = []
        for index, (source, reader) in enumerate(sources):
            known = logged[index] if logged else None
            records = BadRecords(source.name, max_share=settings.max_bad_share, logged=known)
            blocks = SourceBlocks(reader, index=index, lane=lane, settings=settings, records=records)
            self._streams.append(SourceStream(blocks, state[index], encode=encode))
        self._weights = [source.relative_weight for source, _ in sources]
        # Up to a row in advance, or all lanes would take their first row, and many later ones, from the same source.
        credit = settings.generator(lane, _CREDIT_KEY)
        self._credit = credit.uniform(0.0, settings.seq_len, size=len(sources))

    def next_row(self) -> tuple[int, Row]:
        """Return the index of a source and its next row."""
        behind = [
            (stream.tokens + credit) / weight
            for stream, credit, weight in zip(self._streams, self._credit, self._weights, strict=True)
        ]
        source = int(np.argmin(behind))
        return source, self._streams[source].next_row()

    @property
    def state(self) -> LaneState:
        """Where the next row comes from."""
        return tuple(stream.state for stream in self._streams)
