"""Runs a text through all blocks once, for the states at every exit. Tested by tests/unit/lens/test_token_grid.py."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from app.decoding.drafters import run_exit_blocks
from app.protocols import ExitableDecoder

_LOGITS_PER_CHUNK = 2**24  # 64 MiB in float32


def positions_per_chunk(vocab_size: int, *, num_exits: int = 1) -> int:
    """Return at how many positions the logits of so many exits are to exist at a time, at least 1."""
    return max(1, _LOGITS_PER_CHUNK // (num_exits * vocab_size))


class ExitState(NamedTuple):
    """The pre-norm states [1, T, D] of T tokens at an exit, 1..num_layers.

    They are those that leave block E - 1, and those that leave the exit's own blocks: the same where it has none.
    """

    exit_layer: int
    hidden_1TD: Tensor
    exit_1TD: Tensor


def states_by_exit(decoder: ExitableDecoder, tokens: Sequence[int]) -> Iterator[ExitState]:
    """Yield the states of all tokens at every exit, the first exit first."""
    cache = decoder.new_cache(batch_size=1, capacity=len(tokens))
    hidden_1TD = decoder.embed(torch.tensor([[*tokens]], device=decoder.device))
    for exit_layer in range(1, decoder.num_layers + 1):
        hidden_1TD = decoder.run_blocks(hidden_1TD, start=exit_layer - 1, stop=exit_layer, cache=cache)
        exit_1TD = run_exit_blocks(decoder, hidden_1TD, exit_layer=exit_layer, cache=cache)
        yield ExitState(exit_layer, hidden_1TD, exit_1TD)
