"""Who drafts and how the full model verifies: one class for each scheme, all with the same methods.

Tested by tests/unit/decoding/test_work_done.py and test_greedy_equality.py.

Shape legend: `B` sequences, `T` prompt tokens, `S` verified positions (drafts + 1), `D` width, `V` vocabulary.
"""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from app.decoding.settings import DecodingSettings
from app.protocols import DecoderCache, ExitableDecoder


def run_exit_blocks(decoder: ExitableDecoder, hidden_BTD: Tensor, *, exit_layer: int, cache: DecoderCache) -> Tensor:
    """Run the blocks that an exit has of its own on states that leave block `exit_layer` - 1; without any, return them.

    The states [B, T, D] are those of the next T positions of these blocks in the cache.
    """
    if not (own := decoder.exit_span(exit_layer)):
        return hidden_BTD
    return decoder.run_blocks(hidden_BTD, start=own.start, stop=own.stop, cache=cache)


class FullModel:
    """Drafts nothing and runs every position through blocks 0..stop-1; `stop` < num_layers is lossy early exit.

    A round feeds the latest settled token, which no block has seen, and what was drafted after it. `capacity` counts
    the positions that each of `batch_size` sequences is likely to need.

    Attributes:
        draft_ids: The token ids [V'] that the logits of drafts are of; None where these are all.
        takes_rows: Whether further sequences can join between rounds, where all that is kept is in the cache.
    """

    draft_ids: Tensor | None = None
    takes_rows = True

    def __init__(self, decoder: ExitableDecoder, batch_size: int, capacity: int, *, stop: int | None = None) -> None:
        self.decoder, self.stop = decoder, decoder.num_layers if stop is None else stop
        self.cache = decoder.new_cache(batch_size=batch_size, capacity=capacity)

    def prefill(self, tokens_BT: Tensor, lengths: Sequence[int]) -> Tensor:
        """Run the prompts once; return the logits [B, 1, V] of each prompt's last position, and of no other.

        Prompts shorter than T are padded on the right with any id, since what follows a position does not change it.
        """
        hidden_BTD = self._run_all(tokens_BT)
        self.cache.truncate(lengths)
        last_B = torch.tensor(lengths, device=hidden_BTD.device) - 1
        last_B1D = hidden_BTD[torch.arange(len(lengths), device=last_B.device), last_B][:, None]
        return self.decoder.unembed(last_B1D, exit_layer=self.stop)

    def _run_all(self, tokens_BT: Tensor) -> Tensor:
        """The states [B, T, D] that enter the norm, after blocks 0..stop-1 and the exit's own."""
        hidden_BTD = self.decoder.run_blocks(self.decoder.embed(tokens_BT), start=0, stop=self.stop, cache=self.cache)
        return run_exit_blocks(self.decoder, hidden_BTD, exit_layer=self.stop, cache=self.cache)

    def draft(self, tokens_B: Tensor, exits: Sequence[int | None] = ()) -> Tensor:
        """Take one more token of each sequence; return the drafter's logits [B, V'] for the one after it.

        `exits` are those that each sequence wants this draft from, None where it drafts no more. They matter only to a
        drafter that has several.
        """
        raise NotImplementedError("a full model does not draft")

    def verify(self, tokens_BS: Tensor) -> Tensor:
        """Return the full model's logits [B, S, V] at the latest settled token and the drafts after it."""
        return self.decoder.unembed(self._run_all(tokens_BS), exit_layer=self.stop)

    def settle(self, lengths: Sequence[int]) -> None:
        """End a round: forget every position >= lengths[b] of sequence b."""
        self.cache.truncate(lengths)

    def complete(self) -> None:
        """Run what only drafts need over the positions of this round that they have not been made from."""

    def end_drafting(self) -> None:
        """Drop what only drafts need, since none is to come any more."""

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Go on with these sequences only."""
        self.cache.keep_rows(rows)

    def join(self, other: Self) -> None:
        """Between rounds, take over the sequences of another one of one's kind, as rows after one's own."""
        assert self.takes_rows
        self.cache.join(other.cache)


class EarlyExitDrafter(FullModel):
    """The first blocks draft, the others verify, on one cache (LayerSkip, arXiv 2404.16710, section 4.3).

    The states leaving block `exit_layer` - 1 are kept (the paper's exit-query part of the KVQ cache), so drafted
    positions never run through the first blocks again. The last draft runs through them for verification alone.

    An exit's own blocks run on those states, for drafts alone. They see every position that is kept: the prompt and the
    drafts as they are made, and what was kept without having been drafted on at the end of its round.
    """

    def __init__(self, decoder: ExitableDecoder, settings: DecodingSettings, batch_size: int, capacity: int) -> None:
        super().__init__(decoder, batch_size, capacity)
        assert settings.exit_layer is not None
        self.exit_layer, self.draft_ids = settings.exit_layer, decoder.draft_ids
        self._exit_states: list[Tensor] = []  # each [B, 1, D]
        self._drafting_span = decoder.exit_span(self.exit_layer)
        self._undrafted_BTD: Tensor | None = None  # states of this round's positions that the exit's blocks lack

    def draft(self, tokens_B: Tensor, exits: Sequence[int | None] = ()) -> Tensor:
        self._exit_states.append(self._run_to_exit(tokens_B[:, None]))
        hidden_B1D = run_exit_blocks(self.decoder, self._exit_states[-1], exit_layer=self.exit_layer, cache=self.cache)
        return self.decoder.draft_logits(hidden_B1D, exit_layer=self.exit_layer)[:, 0]

    def verify(self, tokens_BS: Tensor) -> Tensor:
        self._undrafted_BTD = self._run_to_exit(tokens_BS[:, len(self._exit_states) :])
        exit_states_BSD = torch.cat([*self._exit_states, self._undrafted_BTD], dim=1)
        self._exit_states = []
        return self.decoder.unembed(self._run_from_exit(exit_states_BSD))

    def settle(self, lengths: Sequence[int]) -> None:
        super().settle(lengths)
        if not (own := self._drafting_span):
            return
        seen = self.cache.lengths(own.start)
        if any(length > known for length, known in zip(lengths, seen, strict=True)):
            # A sequence that kept less begins these states at a later position than theirs, and forgets them again.
            self.complete()
            super().settle(lengths)

    def complete(self) -> None:
        if self._drafting_span:
            assert self._undrafted_BTD is not None
            run_exit_blocks(self.decoder, self._undrafted_BTD, exit_layer=self.exit_layer, cache=self.cache)

    def end_drafting(self) -> None:
        self.takes_rows = self.takes_rows and not self._drafting_span  # blocks that run no more lack positions of a row
        self._drafting_span = range(0)

    def _run_all(self, tokens_BT: Tensor) -> Tensor:
        if not self._drafting_span:
            return super()._run_all(tokens_BT)
        hidden_BTD = self._run_to_exit(tokens_BT)
        run_exit_blocks(self.decoder, hidden_BTD, exit_layer=self.exit_layer, cache=self.cache)
        return self._run_from_exit(hidden_BTD)

    def _run_to_exit(self, tokens_BT: Tensor) -> Tensor:
        hidden_BTD = self.decoder.embed(tokens_BT)
        return self.decoder.run_blocks(hidden_BTD, start=0, stop=self.exit_layer, cache=self.cache)

    def _run_from_exit(self, hidden_BTD: Tensor) -> Tensor:
        return self.decoder.run_blocks(hidden_BTD, start=self.exit_layer, stop=self.stop, cache=self.cache)


class LayerSkipDrafter(FullModel):
    """The full model without some of its blocks drafts (Draft & Verify, arXiv 2309.08168), without any training.

    Blocks after a skipped one see states that the full model would not, so verification runs everything again.
    """

    def __init__(self, decoder: ExitableDecoder, settings: DecodingSettings, batch_size: int, capacity: int) -> None:
        super().__init__(decoder, batch_size, capacity)
        assert settings.skipped_layers is not None
        self.draft_ids = decoder.draft_ids
        ends = [*sorted(set(settings.skipped_layers)), decoder.num_layers]
        starts = [0, *(layer + 1 for layer in ends)]
        self._spans = [(start, stop) for start, stop in zip(starts, ends, strict=False) if start < stop]
        self._settled = [0] * batch_size  # positions of each sequence that the full model has run

    def draft(self, tokens_B: Tensor, exits: Sequence[int | None] = ()) -> Tensor:
        hidden_B1D = self.decoder.embed(tokens_B[:, None])
        for start, stop in self._spans:
            hidden_B1D = self.decoder.run_blocks(hidden_B1D, start=start, stop=stop, cache=self.cache)
        return self.decoder.draft_logits(hidden_B1D, exit_layer=self.stop)[:, 0]

    def prefill(self, tokens_BT: Tensor, lengths: Sequence[int]) -> Tensor:
        self._settled = list(lengths)
        return super().prefill(tokens_BT, lengths)

    def verify(self, tokens_BS: Tensor) -> Tensor:
        self.cache.truncate(self._settled)  # drafts left keys and values that the full model would not
        return super().verify(tokens_BS)

    def settle(self, lengths: Sequence[int]) -> None:
        self._settled = list(lengths)
        super().settle(lengths)

    def keep_rows(self, rows: Sequence[int]) -> None:
        self._settled = [self._settled[row] for row in rows]
        super().keep_rows(rows)

    def join(self, other: Self) -> None:
        self._settled += other._settled
        super().join(other)


class DraftModelDrafter(FullModel):
    """A second, smaller model drafts (Leviathan et al. 2023): the classical scheme the paper compares with."""

    takes_rows = False  # what the small model has not seen yet is kept beside its cache

    def __init__(self, decoder: ExitableDecoder, settings: DecodingSettings, batch_size: int, capacity: int) -> None:
        super().__init__(decoder, batch_size, capacity)
        assert settings.draft_decoder is not None
        self._draft_model: FullModel | None = FullModel(settings.draft_decoder, batch_size, capacity)
        self._fed_BS: Tensor | None = None  # what the large model was fed in this round
        self._num_drafted = 0  # columns of it that the small model has seen
        # Tokens [B, T] of rounds that it drafted nothing in, which the small model runs later.
        self._unseen: list[Tensor] = []

    def prefill(self, tokens_BT: Tensor, lengths: Sequence[int]) -> Tensor:
        assert self._draft_model is not None
        self._draft_model.prefill(tokens_BT, lengths)
        return super().prefill(tokens_BT, lengths)

    def draft(self, tokens_B: Tensor, exits: Sequence[int | None] = ()) -> Tensor:
        assert self._draft_model is not None
        tokens_BT = torch.cat([*self._unseen, tokens_B[:, None]], dim=1)
        self._unseen = []
        self._num_drafted += 1
        # The small model's vocabulary may be padded further than the large one's.
        return self._draft_model.verify(tokens_BT)[:, -1, : self.decoder.vocab_size]

    def verify(self, tokens_BS: Tensor) -> Tensor:
        self._fed_BS = tokens_BS
        return super().verify(tokens_BS)

    def settle(self, lengths: Sequence[int]) -> None:
        """End a round in both models. The small one must still see what it did not draft from, if that was kept."""
        super().settle(lengths)
        small = self._draft_model
        if small is None:
            return
        assert self._fed_BS is not None
        drafted, self._num_drafted = self._num_drafted, 0
        unseen = sum(tokens_BT.shape[1] for tokens_BT in self._unseen)
        missing = [length - seen - unseen for seen, length in zip(small.cache.lengths(0), lengths, strict=True)]
        if not drafted and min(missing) == max(missing):
            self._unseen.append(self._fed_BS[:, : missing[0]])
        elif max(missing) > 0:
            hidden_BTD = small.decoder.embed(torch.cat([*self._unseen, self._fed_BS[:, drafted:]], dim=1))
            small.decoder.run_blocks(hidden_BTD, start=0, stop=small.stop, cache=small.cache)
            self._unseen = []
        small.settle(lengths)

    def end_drafting(self) -> None:
        self._draft_model, self._unseen = None, []

    def keep_rows(self, rows: Sequence[int]) -> None:
        super().keep_rows(rows)
        if self._draft_model is not None:
            index = torch.tensor(rows, device=self.decoder.device)
            self._unseen = [tokens_BT[index] for tokens_BT in self._unseen]
            self._draft_model.keep_rows(rows)
