"""The order of training rows: an endless stream over all sources, as a pure function of (seed, n).

The stream is cut into blocks. In every block each source has the same number of rows, its share of the block, so
the delivered shares are exact to one row a block at any time; where in the block is shuffled by (seed, block).
A source's own rows come in epochs, each a permutation by (seed, source, epoch): every row once before any repeats.
Nothing is remembered but the last few permutations, and any n can be asked for at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from app.errors import ConfigError

BLOCK_ROWS = 1024

_BLOCK_STREAM, _ROW_STREAM = 0, 1  # keep the two kinds of permutation independent


class MixtureOrder:
    """Maps n, the place in the stream, to (source index, row index).

    Args:
        weights: Relative shares of rows, one for each source, each > 0.
        num_rows: How many rows each source has, each >= 1.
        seed: Non-negative; another seed is another order.

    Raises:
        ConfigError: A share is less than half a row in a block: the source would never be seen.
    """

    def __init__(self, *, weights: Sequence[float], num_rows: Sequence[int], seed: int) -> None:
        edges = np.round(np.cumsum([0.0, *weights]) / sum(weights) * BLOCK_ROWS).astype(int)
        self.quotas: tuple[int, ...] = tuple(int(quota) for quota in np.diff(edges))
        if min(self.quotas) < 1:
            raise ConfigError(
                "weight",
                got=weights[self.quotas.index(0)],
                allowed=f"at least 1/{BLOCK_ROWS} of all weights together",
                fix="raise the weight or remove the source",
            )
        self._num_rows = tuple(num_rows)
        self._seed = seed
        self._block = lru_cache(maxsize=4)(self._draw_block)
        self._rows = lru_cache(maxsize=2 * len(weights))(self._draw_rows)

    def row(self, n: int) -> tuple[int, int]:
        """(source index, row index in that source) of the n-th row of the stream, n >= 0."""
        block, place = divmod(n, BLOCK_ROWS)
        sources, ordinals = self._block(block)
        source = int(sources[place])
        seen = block * self.quotas[source] + int(ordinals[place])
        epoch, index = divmod(seen, self._num_rows[source])
        return source, int(self._rows(source, epoch)[index])

    def _draw_block(self, block: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The source at each place of a block, and how many rows of that source come before it in the block."""
        sources = np.repeat(np.arange(len(self.quotas)), self.quotas)
        self._generator(_BLOCK_STREAM, block).shuffle(sources)
        ordinals = np.empty_like(sources)
        for source, quota in enumerate(self.quotas):
            ordinals[sources == source] = np.arange(quota)
        return sources, ordinals

    def _draw_rows(self, source: int, epoch: int) -> npt.NDArray[np.int64]:
        return self._generator(_ROW_STREAM, source, epoch).permutation(self._num_rows[source])

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=key))
