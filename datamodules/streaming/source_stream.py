"""The rows of one source in one lane: its documents tokenised and packed, and the rows shuffled in windows.

A long document gives many rows, so rows are shuffled once more, in windows of half a million tokens of one block.
Tested by tests/unit/datamodules/streaming/test_stream.py.
"""

from collections.abc import Iterator

from datamodules.loading.tokenizers import Encoder
from datamodules.streaming.packing import PACKINGS, Row, Tokens
from datamodules.streaming.source_blocks import SourceBlocks, SourcePosition

_ROW_KEY = 2  # kind of randomness; source_blocks and stream have others
_WINDOW_TOKENS = 2**19  # rows are shuffled among so many tokens
_DOCUMENTS_A_CALL = 64  # given to the tokenizer at once


class SourceStream:
    """The rows of one source in one lane, from a position on."""

    def __init__(self, blocks: SourceBlocks, position: SourcePosition, *, encode: Encoder) -> None:
        self._blocks, self._encode, self._settings = blocks, encode, blocks.settings
        # Where the window begins, and the row after the latest one that was packed.
        self._start = self._next_start = position
        self._window: list[Row] = []
        self._drawn = position.drawn
        self._unfinished: list[SourcePosition] = []  # documents that the packing was given and has not finished
        self._finished = 0  # documents that the packing has finished
        self._last = position  # of the document that the packing was given last
        self._block_documents = 0  # of the block that was read last
        self._extents: dict[int, tuple[int, int]] = {}  # chunks and documents of each block that is in use
        pack = PACKINGS[self._settings.packing]
        self._rows = pack(self._documents(position), seq_len=self._settings.seq_len, within=position.within)

    @property
    def epochs(self) -> float:
        """Passes over the lane's part of the source given out so far; within a window, in proportion to its rows."""
        start = self._passes(self._start)
        if not self._window:
            return start
        return start + (self._passes(self._next_start) - start) * self._drawn / len(self._window)

    def _passes(self, position: SourcePosition) -> float:
        """Passes up to a position; within a block, in proportion to its documents."""
        chunks, documents = self._extents.get(position.block, (0, 1))
        return self._blocks.epochs(position.ordinal + chunks * position.taken / documents)

    @property
    def records(self) -> tuple[int, int]:
        """Records read so far, and bad ones among them."""
        return self._blocks.records.seen, self._blocks.records.skipped

    @property
    def position(self) -> SourcePosition:
        """Where the next row comes from."""
        return self._start._replace(drawn=self._drawn)

    def next_row(self) -> Row:
        """Return the next row and advance `position`; DataError as of `SourceBlocks.read`."""
        if not self._window:
            self._window = self._pack_window()
        row = self._window[self._drawn]
        self._drawn += 1
        if self._drawn == len(self._window):
            self._start, self._window, self._drawn = self._next_start._replace(window=self._start.window + 1), [], 0
        return row

    def _pack_window(self) -> list[Row]:
        """The rows of a window, all of which begin in one block, shuffled."""
        size = _WINDOW_TOKENS // self._settings.seq_len
        row, block = self._pack_row()
        rows = [row]
        while len(rows) < size and self._next_start.block == block and self._next_start.taken < self._block_documents:
            rows.append(self._pack_row()[0])
        if self._settings.shuffle_megabytes == 0:
            return rows
        key = (self._blocks.index, _ROW_KEY, self._blocks.lane, self._start.window)
        return [rows[index] for index in self._settings.generator(*key).permutation(len(rows))]

    def _pack_row(self) -> tuple[Row, int]:
        """The next row in order, and the block in which it begins."""
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
            self._block_documents = len(texts)
            in_use = {block: extent for block, extent in self._extents.items() if block >= self._start.block}
            self._extents = in_use | {start.block: (following.ordinal - start.ordinal, len(texts))}
            for first in range(start.taken, len(texts), _DOCUMENTS_A_CALL):
                for taken, ids in enumerate(self._encode(texts[first : first + _DOCUMENTS_A_CALL]), first):
                    self._last = start._replace(taken=taken)
                    self._unfinished.append(self._last)
                    yield ids[: self._settings.seq_len] if self._settings.long_documents == "truncate" else ids
            yield None
