"""A cache whose lengths are on the device, so that a round is the same sequence of kernels whatever it settles.

Shape legend: `B` sequences, `H` key/value heads, `T` new positions, `C` capacity, `K` head width.
Tested by tests/unit/spans/test_kv_cache.py and tests/unit/decoding/test_static_rounds.py.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from app.spans.kv_cache import KeyValueCache, shortage_told


class StaticCache(KeyValueCache):
    """Stores of one shape that never move; implements protocols.StaticDecoderCache.

    A pass over the prompts fills it like a KeyValueCache. From the first `begin_round` on, a row's new positions begin
    at its number in `lengths_B`, which only the device knows, and each pass looks at all C positions through a mask.
    What a block has run within a round is a plain integer that is the same for all rows; `begin_round` forgets it, and
    with it whatever was stored at or beyond `lengths_B`.
    """

    def __init__(self, *, num_layers: int, batch_size: int, capacity: int, device: torch.device) -> None:
        super().__init__(num_layers=num_layers, batch_size=batch_size, capacity=capacity)
        self.capacity, self.num_rows = capacity, batch_size
        self.lengths_B = torch.zeros(batch_size, dtype=torch.long, device=device)
        self._rows_B1 = torch.arange(batch_size, device=device)[:, None]
        self._ahead: list[int] | None = None  # positions that each block has run in this round; None: no round yet
        self._this_round: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # (ahead, T) -> positions, flat slots

    @property
    def masked_capacity(self) -> int | None:
        return None if self._ahead is None else self.capacity

    def clear(self) -> None:
        """Forget everything, so that a pass over the prompts of all rows can follow."""
        self.num_rows = len(self.lengths_B)
        self._ahead, self._lengths = None, [(0,) * self.num_rows] * len(self._lengths)

    def begin_round(self) -> None:
        """Let every block go on at `lengths_B`."""
        self._ahead = [0] * len(self._lengths)
        self._this_round.clear()

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` positions, elsewhere in memory."""
        added, self.capacity, self.tables = capacity - self.capacity, capacity, None
        for layer_idx, store in enumerate(self._stores):
            if store is not None:
                with self._shortage_told():
                    keys, values = (torch.nn.functional.pad(each, (0, 0, 0, 0, 0, added)) for each in store)
                self._stores[layer_idx] = keys, values

    def _shortage_told(self) -> AbstractContextManager[None]:
        return shortage_told(f"static with room for {len(self.lengths_B)} x {self.capacity} positions")

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Move these sequences to the first rows, in this order; the next passes are over so many rows."""
        index = torch.tensor(rows, device=self.lengths_B.device)
        self.num_rows = len(rows)
        for store in (self.lengths_B, *(each for pair in self._stores if pair is not None for each in pair)):
            store[: len(rows)] = store.index_select(0, index)

    def next_positions(self, layer_idx: int, num_new: int, *, device: torch.device) -> Tensor:
        """The next `num_new` positions of each row in block `layer_idx` [B, T]."""
        if self._ahead is None:
            return super().next_positions(layer_idx, num_new, device=device)
        return self._places(layer_idx, num_new)[0]

    def append(self, key_BTHK: Tensor, value_BTHK: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append as KeyValueCache does; in a round, return all C positions, the unwritten ones of which are zeros."""
        if self._ahead is None:
            return super().append(key_BTHK, value_BTHK, layer_idx)
        num_new = key_BTHK.shape[1]
        store = self._stores[layer_idx]
        assert store is not None, "a block that saw no prompt"
        _, slots = self._places(layer_idx, num_new)
        views = []
        for whole_BCHK, new_BTHK in zip(store, (key_BTHK, value_BTHK), strict=True):
            whole_BCHK.flatten(0, 1).index_copy_(0, slots, new_BTHK.flatten(0, 1))
            views.append(whole_BCHK[: self.num_rows].transpose(1, 2))
        self._ahead[layer_idx] += num_new
        return views[0], views[1]

    def _places(self, layer_idx: int, num_new: int) -> tuple[Tensor, Tensor]:
        """The next positions of block `layer_idx` [B, T], and their indices [B * T] in stores seen as one long row."""
        assert self._ahead is not None
        key = self._ahead[layer_idx], num_new
        if key not in self._this_round:
            new_T = torch.arange(key[0], key[0] + num_new, device=self.lengths_B.device)
            positions_BT = self.lengths_B[: self.num_rows, None] + new_T
            slots_BT = self._rows_B1[: self.num_rows] * self.capacity + positions_BT
            self._this_round[key] = positions_BT, slots_BT.flatten()
        return self._this_round[key]

    def _room(self, needed: int, *, like_BTHK: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        store = self._stores[layer_idx]
        assert needed <= self.capacity, "beyond the capacity"
        if store is None:  # masks do not hide a NaN of unwritten memory
            shape = len(like_BTHK), self.capacity, *like_BTHK.shape[2:]
            with self._shortage_told():
                store = self._stores[layer_idx] = like_BTHK.new_zeros(shape), like_BTHK.new_zeros(shape)
        return store
