"""Says which stored positions new ones see, and where SDPA needs no mask. Tested by tests/unit/spans/test_decoder.py.

Shape legend: `B` sequences, `T` new positions, `S` stored positions (new ones included).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def attention_mask(
    starts: Sequence[int], *, queries_BT: Tensor, window: int | None, first: int = 0, like: Tensor
) -> Tensor | None:
    """Zeros and -inf [1 or B, 1, T, S - first] for the scores, or None where SDPA needs no mask.

    Position i sees every j <= i, and with a window w only j > i - w. Without a mask SDPA lets one query see everything
    and treats several as causal from position 0, so those two cases need none.

    Args:
        starts: Stored positions of each sequence.
        queries_BT: The new positions, which begin there; [1, T] where all sequences are equally long.
        window: w, or None.
        first: First position that any new one sees.
        like: A tensor of the wanted type and device.
    """
    num_new = queries_BT.shape[1]
    num_stored = max(starts) + num_new
    if needs_no_mask(starts, num_new, window, first):
        return None
    if min(starts) == max(starts) and _fits(num_stored - first, window):
        return causal_mask(num_new, num_stored - first, like=like)
    return position_mask(queries_BT, range(first, num_stored), window, like=like)


def position_mask(queries_BT: Tensor, keys: range, window: int | None, *, like: Tensor) -> Tensor:
    """The mask [1 or B, 1, T, len(keys)] of new positions over stored ones, whatever their numbers are."""
    query_BT1 = queries_BT[..., None]
    key_S = torch.arange(keys.start, keys.stop, device=like.device)
    hidden_BTS = key_S > query_BT1
    if window is not None:
        hidden_BTS |= key_S <= query_BT1 - window
    return like.new_zeros(hidden_BTS.shape).masked_fill_(hidden_BTS, float("-inf"))[:, None]


def needs_no_mask(starts: Sequence[int], num_new: int, window: int | None, first: int = 0) -> bool:
    """Whether SDPA is right without a mask for `num_new` positions that see stored ones from `first` on."""
    fits = _fits(max(starts) + num_new - first, window)
    return min(starts) == max(starts) and fits and (num_new == 1 or max(starts) == 0)


def _fits(num_positions: int, window: int | None) -> bool:
    return window is None or num_positions <= window


def causal_mask(num_new: int, num_stored: int, *, like: Tensor) -> Tensor:
    """The mask [1, 1, T, S] of the last `num_new` of the stored positions without a window."""
    blocked = like.new_full((num_new, num_stored), float("-inf"))
    return blocked.triu_(num_stored - num_new + 1)[None, None]
