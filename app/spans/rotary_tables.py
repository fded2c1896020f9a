"""Rotary tables of the positions that a pass adds, cut from tables that are made once.

Shape legend: `B` sequences, `T` new positions, `P` positions, `K` head width, `D` width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from app.spans.kv_cache import KeyValueCache


class Tables(NamedTuple):
    """Position ids [1 or B, P], and for each cos, sin, and sin with its first half negated, each [1 or B, P, K]."""

    positions: Tensor
    cos: Tensor
    sin: Tensor
    signed_sin: Tensor


class RotaryTables:
    """Tables of a model's rotary embedding, since computing them anew would take a fifth of a short draft's time."""

    def __init__(self, rotary_embedding: Any, *, max_length: int) -> None:
        self._embedding, self._max_length = rotary_embedding, max_length
        self._tables: Tables | None = None

    def next(self, cache: KeyValueCache, start: int, num_new: int, *, like: Tensor) -> Tables:
        """Tables of block `start`'s next positions: [1, T, ...] where all sequences are equally long, else [B, T, ...].

        `like` are states [B, T, D] of the wanted type and device.
        """
        if (capacity := cache.masked_capacity) is not None:
            tables = cache.tables = cache.tables or self._up_to(capacity, like=like)
        else:
            starts = cache.lengths(start)
            tables = self._up_to(max(starts) + num_new, like=like)
            if min(starts) == max(starts):
                return Tables(*(table[:, starts[0] : starts[0] + num_new] for table in tables))
        positions_BT = cache.next_positions(start, num_new, device=like.device)
        return Tables(*(table[0, positions_BT] for table in tables))

    def _up_to(self, stop: int, *, like: Tensor) -> Tables:
        if self._tables is None or self._tables.cos.shape[1] < stop or self._tables.cos.dtype != like.dtype:
            positions_1P = torch.arange(max(stop, min(self._max_length, 2 * stop)), device=like.device)[None]
            cos, sin = self._embedding(like, positions_1P)
            half = sin.shape[-1] // 2
            self._tables = Tables(positions_1P, cos, sin, torch.cat((-sin[..., :half], sin[..., half:]), -1))
        return self._tables
