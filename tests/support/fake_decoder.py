"""A decoder whose every choice the test writes down, and which notices a block that sees a wrong past.

Shape legend: `B` sequences, `T` tokens, `C` capacity, `V` vocabulary. A hidden state is (token, blocks run, past,
shortcut): past sums up the tokens up to and including this one as `past_after` does; shortcut is 1 from the first
position on that came to a block by a way other than the full model's.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", int, Tensor)


def past_after(past: Number, token: Number) -> Number:
    """Sum up one token more; 0 is the past of nothing."""
    return (past * 31 + token + 1) % 1_000_003


class FakeCache:
    """Past and shortcut of every position in every block; the rest is the protocol's."""

    def __init__(self, num_layers: int, batch_size: int, capacity: int) -> None:
        self._lengths = [(0,) * batch_size] * num_layers
        self._stores = [torch.zeros(batch_size, capacity, 2, dtype=torch.long) for _ in range(num_layers)]

    def lengths(self, layer_idx: int) -> tuple[int, ...]:
        return self._lengths[layer_idx]

    def last(self, layer_idx: int) -> Tensor:
        """What is stored for each row's last position [B, 2], zeros for an empty row."""
        ends_B = torch.tensor(self._lengths[layer_idx])
        last_B2 = self._stores[layer_idx][torch.arange(len(ends_B)), (ends_B - 1).clamp(min=0)]
        return last_B2.where((ends_B > 0)[:, None], 0)

    def append(self, layer_idx: int, new_BT2: Tensor) -> None:
        batch, num_new, _ = new_BT2.shape
        ends, store_BC2 = self._lengths[layer_idx], self._stores[layer_idx]
        missing = max(ends) + num_new - store_BC2.shape[1]
        if missing > 0:
            store_BC2 = torch.cat((store_BC2, store_BC2.new_zeros(batch, missing, 2)), dim=1)
        slots_BT = torch.tensor(ends)[:, None] + torch.arange(num_new)
        store_BC2[torch.arange(batch)[:, None], slots_BT] = new_BT2
        self._stores[layer_idx] = store_BC2
        self._lengths[layer_idx] = tuple(end + num_new for end in ends)

    def truncate(self, lengths: Sequence[int]) -> None:
        self._lengths = [tuple(min(pair) for pair in zip(filled, lengths, strict=True)) for filled in self._lengths]

    def keep_rows(self, rows: Sequence[int]) -> None:
        self._lengths = [tuple(filled[row] for row in rows) for filled in self._lengths]
        self._stores = [store[list(rows)] for store in self._stores]

    def join(self, other: "FakeCache") -> None:
        self._lengths = [own + new for own, new in zip(self._lengths, other._lengths, strict=True)]
        for layer_idx, (own, new) in enumerate(zip(self._stores, other._stores, strict=True)):
            longest = max(own.shape[1], new.shape[1])
            parts = [torch.cat((each, each.new_zeros(len(each), longest - each.shape[1], 2)), 1) for each in (own, new)]
            self._stores[layer_idx] = torch.cat(parts)


class FakeStaticCache(FakeCache):
    """The same with lengths on the device, which it may look at."""

    def __init__(self, num_layers: int, batch_size: int, capacity: int) -> None:
        super().__init__(num_layers, batch_size, capacity)
        self.capacity, self.lengths_B, self._num_rows = capacity, torch.zeros(batch_size, dtype=torch.long), batch_size

    def clear(self) -> None:
        super().__init__(len(self._lengths), len(self.lengths_B), self.capacity)
        self._num_rows = len(self.lengths_B)

    def begin_round(self) -> None:
        self._lengths = [tuple(self.lengths_B[: self._num_rows].tolist())] * len(self._lengths)

    def grow(self, capacity: int) -> None:
        self.capacity = capacity

    def keep_rows(self, rows: Sequence[int]) -> None:
        super().keep_rows(rows)
        self._num_rows = len(rows)
        self.lengths_B[: len(rows)] = self.lengths_B[list(rows)]


class FakeDecoder:
    """Token t is followed by `full_logits[t]` after all blocks and by `exit_logits[t]` after fewer; each [V, V].

    Attributes:
        by_past: Index the logits, then each [any number, V], by the past modulo their number instead of the token, so
            that a cache with anything wrong in it leads to other tokens.
        may_skip: Whether a run may start after fewer blocks than lie before it.
        unspeakable: Tokens outside the draft vocabulary.
        own_exit, num_own: An exit with blocks of its own, and how many; they must see every position.
        spans: (start, stop, tokens) of every run of blocks.
        heads: Number of positions in every run of the head.
        elapsed: What all runs cost by the model of app.decoding.cost_model, in blocks: the time of a fake clock.
    """

    num_layers = 4
    device = torch.device("cpu")
    block_size, head_size = 100, 100
    extra_token = 0.03
    by_past = may_skip = False
    kept_program: Any = None
    own_exit, num_own = 0, 0
    unspeakable: tuple[int, ...] = ()

    def __init__(self, full_logits: Tensor, exit_logits: Tensor, *, max_length: int = 64) -> None:
        self.full_logits, self.exit_logits, self.max_length = full_logits, exit_logits, max_length
        self.vocab_size = full_logits.shape[-1]
        self.spans: list[tuple[int, int, int]] = []
        self.heads: list[int] = []
        self.elapsed = 0.0

    def new_cache(self, *, batch_size: int = 1, capacity: int) -> FakeCache:
        return FakeCache(self.num_layers + self.num_own, batch_size, capacity)

    def new_static_cache(self, *, batch_size: int, capacity: int) -> FakeStaticCache:
        return FakeStaticCache(self.num_layers + self.num_own, batch_size, capacity)

    @property
    def draft_head_size(self) -> int:
        return self.head_size

    draft_vocabulary: Sequence[int] | None = None

    @property
    def draft_ids(self) -> Tensor | None:
        return torch.tensor(sorted(set(range(self.vocab_size)) - {*self.unspeakable})) if self.unspeakable else None

    def use_draft_vocabulary(self, token_ids: Sequence[int] | None) -> None:
        self.draft_vocabulary = token_ids
        self.unspeakable = () if token_ids is None else tuple(set(range(self.vocab_size)) - {*token_ids})

    def exit_span(self, exit_layer: int) -> range:
        own = range(self.num_layers, self.num_layers + self.num_own)
        return own if exit_layer == self.own_exit else range(0)

    def exit_block_size(self, exit_layer: int) -> int:
        return len(self.exit_span(exit_layer)) * self.block_size

    def embed(self, tokens_BT: Tensor) -> Tensor:
        nothing_BT = torch.zeros_like(tokens_BT)
        return torch.stack([tokens_BT, nothing_BT, nothing_BT, nothing_BT], dim=-1)

    def run_blocks(self, hidden_BTD: Tensor, *, start: int, stop: int, cache: FakeCache) -> Tensor:
        tokens_BT, run_BT, *_ = hidden_BTD.unbind(-1)
        batch, num_new = tokens_BT.shape
        is_own = start >= self.num_layers
        is_full = bool(
            (run_BT == (self.own_exit if is_own else start)).all()
        )  # came through all blocks before this one
        assert is_full or self.may_skip, "blocks must run in order"
        assert len({cache.lengths(layer_idx) for layer_idx in range(start, stop)}) == 1, "equally filled blocks"
        fits = batch > 1 or cache.lengths(start)[0] + num_new <= self.max_length
        assert fits or isinstance(cache, FakeStaticCache), "ran past the context"
        self.spans.append((start, stop, num_new))
        self.elapsed += (stop - start) * (1 + self.extra_token * (num_new - 1))
        last_B2 = cache.last(start)
        assert all(torch.equal(last_B2, cache.last(layer_idx)) for layer_idx in range(start + 1, stop)), "unequal pasts"
        assert not (is_full and last_B2[:, 1].any()), f"the full model saw a draft's states in block {start}"
        pasts = [last_B2[:, 0]]
        for token_B in tokens_BT.unbind(1):
            pasts.append(past_after(pasts[-1], token_B))
        past_BT = torch.stack(pasts[1:], dim=1)
        assert start == 0 or not is_full or torch.equal(past_BT, hidden_BTD[..., 2]), f"block {start}: a foreign past"
        shortcut_BT = torch.full_like(past_BT, not is_full) | last_B2[:, 1:]
        for layer_idx in range(start, stop):
            cache.append(layer_idx, torch.stack([past_BT, shortcut_BT], dim=-1))
        run_BT = torch.full_like(run_BT, -1) if is_own else run_BT + stop - start
        return torch.stack([tokens_BT, run_BT, past_BT, shortcut_BT], dim=-1)

    def draft_logits(self, hidden_BTD: Tensor, *, exit_layer: int) -> Tensor:
        logits_BTV = self.unembed(hidden_BTD, exit_layer=exit_layer)
        return logits_BTV if self.draft_ids is None else logits_BTV[..., self.draft_ids]

    def unembed(self, hidden_BTD: Tensor, *, exit_layer: int | None = None) -> Tensor:
        if exit_layer == self.own_exit:
            assert (hidden_BTD[..., 1] == -1).all(), "an exit's own blocks were left out"
        batch, num_new, _ = hidden_BTD.shape
        self.heads.append(batch * num_new)
        self.elapsed += self.head_size / self.block_size * (1 + self.extra_token * (num_new - 1))
        index_BT = hidden_BTD[..., 2] % len(self.full_logits) if self.by_past else hidden_BTD[..., 0]
        is_full_BT1 = hidden_BTD[..., 1:2] == self.num_layers
        return torch.where(is_full_BT1, self.full_logits[index_BT], self.exit_logits[index_BT])


def counting_decoder(*, misses: tuple[int, ...] = (), vocab_size: int = 50, max_length: int = 64) -> FakeDecoder:
    """After t comes t + 1; exits say t + 2 where t is in `misses`."""
    full = torch.eye(vocab_size).roll(1, dims=1)
    exits = full.clone()
    for token in misses:
        exits[token] = full[token].roll(1)
    return FakeDecoder(full, exits, max_length=max_length)
