"""A decoder whose every choice the test writes down; a hidden state is (token, blocks run)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class FakeCache:
    def __init__(self, num_layers: int, batch_size: int) -> None:
        self._lengths = [(0,) * batch_size] * num_layers

    def lengths(self, layer_idx: int) -> tuple[int, ...]:
        return self._lengths[layer_idx]

    def append(self, layer_idx: int, num_new: int) -> None:
        self._lengths[layer_idx] = tuple(length + num_new for length in self._lengths[layer_idx])

    def truncate(self, lengths: Sequence[int]) -> None:
        self._lengths = [tuple(map(min, filled, lengths)) for filled in self._lengths]

    def keep_rows(self, rows: Sequence[int]) -> None:
        self._lengths = [tuple(filled[row] for row in rows) for filled in self._lengths]


class FakeDecoder:
    """Token t is followed by `full_logits[t]` at the full model and `exit_logits[t]` at any exit; each [V, V]."""

    num_layers = 4
    device = torch.device("cpu")
    block_size, head_size = 100, 100
    may_skip = False

    def __init__(self, full_logits: Tensor, exit_logits: Tensor, *, max_length: int = 64) -> None:
        self.full_logits, self.exit_logits, self.max_length = full_logits, exit_logits, max_length
        self.vocab_size = len(full_logits)
        self.spans: list[tuple[int, int, int]] = []  # (start, stop, tokens) of every run

    def new_cache(self, *, batch_size: int = 1, capacity: int) -> FakeCache:
        return FakeCache(self.num_layers, batch_size)

    def embed(self, tokens_BT: Tensor) -> Tensor:
        return torch.stack([tokens_BT, torch.zeros_like(tokens_BT)], dim=-1)

    def run_blocks(self, hidden_BTD: Tensor, *, start: int, stop: int, cache: FakeCache) -> Tensor:
        assert (hidden_BTD[..., 1] == start).all() or self.may_skip, "blocks must run in order"
        assert len({cache.lengths(layer_idx) for layer_idx in range(start, stop)}) == 1, "equally filled blocks"
        self.spans.append((start, stop, hidden_BTD.shape[1]))
        for layer_idx in range(start, stop):
            cache.append(layer_idx, hidden_BTD.shape[1])
            assert len(hidden_BTD) > 1 or cache.lengths(layer_idx)[0] <= self.max_length, "ran past the context"
        return torch.stack([hidden_BTD[..., 0], torch.full_like(hidden_BTD[..., 1], stop)], dim=-1)

    def unembed(self, hidden_BTD: Tensor) -> Tensor:
        token_BT, is_full_BT1 = hidden_BTD[..., 0], hidden_BTD[..., 1:] == self.num_layers
        return torch.where(is_full_BT1, self.full_logits[token_BT], self.exit_logits[token_BT])


def counting_decoder(*, misses: tuple[int, ...] = (), vocab_size: int = 50, max_length: int = 64) -> FakeDecoder:
    """After t comes t + 1; exits say t + 2 where t is in `misses`."""
    full = torch.eye(vocab_size).roll(1, dims=1)
    exits = full.clone()
    for token in misses:
        exits[token] = full[token].roll(1)
    return FakeDecoder(full, exits, max_length=max_length)
