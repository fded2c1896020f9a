"""The endless stream of training rows of one lane: the rows of all its sources, mixed by weight.

A run has V lanes, and a lane is what one worker process reads: a part of every source, disjoint from the parts of all
other lanes (`source_blocks`), packed and shuffled source by source (`source_stream`).

Everything is a function of the seed and of the place, so a place is all that a checkpoint needs: ten integers for each
source of a lane. A lane set to a place reads one block and packs one window of rows again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from datamodules.loading.tokenizers import Encoder
from datamodules.readers.records import BadRecord, Reader
from datamodules.readers.sources import Source
from datamodules.streaming.packing import Row
from datamodules.streaming.source_blocks import Place, SourceLane, StreamSettings
from datamodules.streaming.source_stream import SourceStream

_CREDIT_KEY = 3  # kind of randomness, beside those of the sources


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


class Lane:
    """The endless mixture of all sources in one lane: of the sources, the one that is furthest behind gives a row.

    So the tokens delivered keep to the weights, to within a row of each source, at any time.

    Args:
        sources: Each with its reader.
        lane: 0..V-1.
        encode: Texts to token ids.
        settings: Of the stream.
        state: Where to begin.
        logged: Of each source the bad records that were logged before; all lanes of a process share them.
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
        parts = [
            SourceLane(
                source=source,
                reader=reader,
                index=index,
                lane=lane,
                settings=settings,
                logged=logged[index] if logged else None,
            )
            for index, (source, reader) in enumerate(sources)
        ]
        self._streams = [SourceStream(*each, encode=encode) for each in zip(parts, state.places, strict=True)]
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
