"""How many blocks have run over each of the latest positions, and their states there.

Tested by tests/unit/decoding/test_mixed_exits.py.

Shape legend: `B` sequences, `T` new positions, `N` pending positions, `D` width.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from app.protocols import DecoderCache, ExitableDecoder


class Frontier:
    """The positions of a round, which may have run to different depths.

    f(p) counts the blocks that have run over position p. Block l may run over p where f(q) > l for all q < p, since
    only then it sees their keys and values. So f never rises along a sequence, and the positions are kept as runs of
    equal depth, the deepest first. Going deeper takes the last run to the depth of the one before it, joins both, and
    so on: each block runs once over all positions that lack it.

    Args:
        decoder: Runs the blocks.
        cache: Where their keys and values are.
        watched: Depths whose states are kept in `left_at` as positions pass them.

    Attributes:
        left_at: Depth -> states [B, T, D] of the positions that passed it, in their order, until somebody takes them.
    """

    def __init__(self, decoder: ExitableDecoder, cache: DecoderCache, *, watched: Collection[int]) -> None:
        self._decoder, self._cache = decoder, cache
        self._runs: list[tuple[int, Tensor]] = []  # depth and states [B, N, D], the earliest positions first
        self.left_at: dict[int, list[Tensor]] = {depth: [] for depth in watched}

    def add(self, tokens_BT: Tensor) -> None:
        """Add new positions after the others; no block has run over them."""
        self._runs.append((0, self._decoder.embed(tokens_BT)))

    def advance(self, depth: int) -> Tensor:
        """Run blocks until `depth` of them have seen every position; return the states [B, N, D] of the last run.

        These are of all positions at exactly this depth, the newest among them; deeper ones stay where they are.
        """
        while self._runs[-1][0] < depth:
            start, states_BND = self._runs.pop()
            stop = min(self._runs[-1][0], depth) if self._runs else depth
            states_BND = self._run(states_BND, start, stop)
            if self._runs and self._runs[-1][0] == stop:
                states_BND = torch.cat([self._runs.pop()[1], states_BND], dim=1)
            self._runs.append((stop, states_BND))
        assert self._runs[-1][0] == depth, "a position was taken deeper than one before it"
        return self._runs[-1][1]

    def end(self) -> None:
        """Forget the positions, since all blocks have run over those that are kept."""
        self._runs = []

    def _run(self, states_BND: Tensor, start: int, stop: int) -> Tensor:
        for depth in [*sorted(depth for depth in self.left_at if start < depth < stop), stop]:
            states_BND = self._decoder.run_blocks(states_BND, start=start, stop=depth, cache=self._cache)
            if depth in self.left_at:
                self.left_at[depth].append(states_BND)
            start = depth
        return states_BND
