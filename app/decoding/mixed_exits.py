"""Drafts from several exits on one cache, a different one for every token if need be.

Tested by tests/unit/decoding/test_mixed_exits.py.

Shape legend: `B` sequences, `T` new positions, `S` verified positions (drafts + 1), `D` width, `V'` draft vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from app.decoding.drafters import FullModel
from app.decoding.frontier import Frontier
from app.decoding.settings import DecodingSettings
from app.protocols import DecoderCache, ExitableDecoder


class MixedExitDrafter(FullModel):
    """The first blocks draft, as many as the chosen exit has, and the others verify, on one cache.

    Within a round positions run to different depths (`Frontier`). Verification takes all of them through all blocks, so
    that every round begins with equal depths. The blocks that an exit has of its own run only when it drafts, and then
    over all positions that they lack, in one pass.
    """

    def __init__(self, decoder: ExitableDecoder, settings: DecodingSettings, batch_size: int, capacity: int) -> None:
        super().__init__(decoder, batch_size, capacity)
        self.draft_ids = decoder.draft_ids
        self._own = {
            exit_layer: _OwnBlocks(decoder, self.cache, exit_layer)
            for exit_layer in settings.candidate_exits
            if decoder.exit_span(exit_layer)
        }
        self.takes_rows = not self._own  # they keep states of a row's past
        self._frontier = Frontier(decoder, self.cache, watched=self._own)
        self._num_fed = 0  # positions of this round

    def draft(self, tokens_B: Tensor, exits: Sequence[int | None] = ()) -> Tensor:
        self._add(tokens_B[:, None])
        chosen = sorted({exit_layer for exit_layer in exits if exit_layer is not None})
        logits_BV = self._draft_from(chosen[0])
        for exit_layer in chosen[1:]:
            is_chosen_B = torch.tensor([each == exit_layer for each in exits], device=tokens_B.device)
            logits_BV = self._draft_from(exit_layer).where(is_chosen_B[:, None], logits_BV)
        return logits_BV

    def _draft_from(self, exit_layer: int) -> Tensor:
        """The logits [B, V'] of this exit at the newest position."""
        hidden_B1D = self._frontier.advance(exit_layer)[:, -1:]
        if (own := self._own.get(exit_layer)) is not None:
            hidden_B1D = own.run(self._frontier.left_at[exit_layer])
        return self.decoder.draft_logits(hidden_B1D, exit_layer=exit_layer)[:, 0]

    def verify(self, tokens_BS: Tensor) -> Tensor:
        self._add(tokens_BS[:, self._num_fed :])
        return self.decoder.unembed(self._frontier.advance(self.stop))

    def settle(self, lengths: Sequence[int]) -> None:
        super().settle(lengths)
        for exit_layer, own in self._own.items():
            own.settle(self._frontier.left_at[exit_layer], lengths)
        self._frontier.end()
        self._num_fed = 0

    def keep_rows(self, rows: Sequence[int]) -> None:
        super().keep_rows(rows)
        for own in self._own.values():
            own.keep_rows(rows)

    def end_drafting(self) -> None:
        self._own = {}
        self._frontier = Frontier(self.decoder, self.cache, watched=())

    def _run_all(self, tokens_BT: Tensor) -> Tensor:
        self._frontier.add(tokens_BT)
        hidden_BTD = self._frontier.advance(self.stop)
        for exit_layer, own in self._own.items():
            own.run(self._frontier.left_at[exit_layer])
        self._frontier.end()
        return hidden_BTD

    def _add(self, tokens_BT: Tensor) -> None:
        self._frontier.add(tokens_BT)
        self._num_fed += tokens_BT.shape[1]


class _OwnBlocks:
    """The blocks that an exit has of its own, and the states of settled positions that they have not run over."""

    def __init__(self, decoder: ExitableDecoder, cache: DecoderCache, exit_layer: int) -> None:
        self._decoder, self._cache, self._span = decoder, cache, decoder.exit_span(exit_layer)
        # States [B, T, D] and how many of the T positions each row has, counted from the first; one pair for a round.
        self._lacking: list[tuple[Tensor, list[int]]] = []

    def run(self, new: list[Tensor]) -> Tensor:
        """Run over all positions that were lacking and the new ones [B, T, D], which are taken out of the list.

        Return the states [B, 1, D] that leave these blocks at each row's last position.
        """
        parts = [*self._lacking, *((states_BTD, [states_BTD.shape[1]] * len(states_BTD)) for states_BTD in new)]
        self._lacking = []
        new.clear()
        is_even = all(min(counts) == max(counts) for _, counts in parts)
        if is_even:
            states_BTD = torch.cat([states_BTD[:, : counts[0]] for states_BTD, counts in parts], dim=1)
        else:  # rows end at different columns, and what follows them is forgotten again
            rows = range(len(parts[0][0]))
            states_BTD = pad_sequence(
                [torch.cat([states_BTD[row, : counts[row]] for states_BTD, counts in parts]) for row in rows],
                batch_first=True,
            )
        hidden_BTD = self._decoder.run_blocks(
            states_BTD, start=self._span.start, stop=self._span.stop, cache=self._cache
        )
        if is_even:
            return hidden_BTD[:, -1:]
        self._cache.truncate(self._cache.lengths(0))
        last_B = torch.tensor([sum(column) - 1 for column in zip(*(counts for _, counts in parts), strict=True)])
        last_B = last_B.to(hidden_BTD.device)
        return hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B][:, None]

    def settle(self, new: list[Tensor], lengths: Sequence[int]) -> None:
        """Keep the new states of the positions that were kept, once the cache has forgotten the others."""
        seen = self._cache.lengths(self._span.start)
        before = [sum(column) for column in zip(*(counts for _, counts in self._lacking), strict=True)] or [0] * len(
            seen
        )
        kept = [length - known - more for length, known, more in zip(lengths, seen, before, strict=True)]
        if max(kept) > 0:
            self._lacking.append((torch.cat(new, dim=1)[:, : max(kept)], kept))
        new.clear()

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Go on with these sequences only."""
        self._lacking = [
            (states_BTD[list(rows)], [counts[row] for row in rows]) for states_BTD, counts in self._lacking
        ]
