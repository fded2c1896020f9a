"""The endless stream of training rows of one lane: the rows of all its sources, mixed by weight.

A run has V lanes. A lane is what one worker process reads: a part of every source, disjoint from the parts of all other
lanes (`source_blocks`), packed and shuffled source by source (`source_stream`).

Everything is a function of the seed and of the position, so a checkpoint holds ten integers for each source of a lane.
A lane set to a position reads one block and packs one window of rows again.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from datamodules.loading.tokenizers import Encoder
from datamodules.readers.records import BadRecord, Reader
from datamodules.readers.sources import Source
from datamodules.streaming.bad_records import BadRecords
from datamodules.streaming.packing import Row
from datamodules.streaming.source_blocks import SourceBlocks, SourcePosition, StreamSettings
from datamodules.streaming.source_stream import SourceStream

_CREDIT_KEY = 3  # kind of randomness; source_blocks and source_stream have others


class LaneState(NamedTuple):
    """Where the next row of each source begins, and what each source gave so far.

    `tokens` (without padding) and `rows` were delivered. For information, `epochs` counts passes over the lane's part
    of the source, `seen` the records read, and `skipped` the bad ones among them.
    """

    positions: tuple[SourcePosition, ...]
    tokens: tuple[int, ...]
    rows: tuple[int, ...]
    epochs: tuple[float, ...]
    seen: tuple[int, ...]
    skipped: tuple[int, ...]

    @classmethod
    def start(cls, num_sources: int) -> "LaneState":
        """The state of a lane that has delivered nothing."""
        zeros = (0,) * num_sources
        return cls((SourcePosition(),) * num_sources, zeros, zeros, (0.0,) * num_sources, zeros, zeros)

    def to_lists(self) -> list[list[Any]]:
        """The state as lists of numbers, for a checkpoint."""
        return [[list(position) for position in self.positions], *map(list, self[1:])]

    @classmethod
    def from_lists(cls, lists: list[list[Any]]) -> "LaneState":
        """The inverse of `to_lists`."""
        positions, *figures = lists
        return cls(tuple(SourcePosition(*position) for position in positions), *map(tuple, figures))


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
            self._streams.append(SourceStream(blocks, state.positions[index], encode=encode))
        self._weights = [source.relative_weight for source, _ in sources]
        self._tokens, self._rows = list(state.tokens), list(state.rows)
        # Up to a row in advance, or all lanes would take their first row, and many later ones, from the same source.
        credit = settings.generator(lane, _CREDIT_KEY)
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
        seen, skipped = zip(*(stream.records for stream in self._streams), strict=True)
        return LaneState(
            positions=tuple(stream.position for stream in self._streams),
            tokens=tuple(self._tokens),
            rows=tuple(self._rows),
            epochs=tuple(stream.epochs for stream in self._streams),
            seen=seen,
            skipped=skipped,
        )
