"""Keys and values of every block: written by index, read as views, truncated by moving a number.

Shape legend: `B` sequences, `H` key/value heads, `T` new positions, `S` stored positions, `C` capacity, `K` head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from app.errors import check_range

_GROWTH = 256  # positions, the least that a full store grows by


class KeyValueCache:
    """Keys and values of every block; implements protocols.DecoderCache.

    Position p of a sequence lies at index p of its row, whatever the other rows hold. Blocks may be filled to
    different lengths, which is what lets drafting run ahead in the first blocks; so may rows.

    Args:
        num_layers: Number of blocks, at least 1.
        batch_size: Sequences, at least 1.
        capacity: Positions to reserve for each, at least 1; a full store grows by half. A block's memory is taken at
            its first `append`, which is where the shape, type and device of the keys are learned.
    """

    def __init__(self, *, num_layers: int, batch_size: int = 1, capacity: int) -> None:
        check_range("num_layers", num_layers, low=1)
        check_range("batch_size", batch_size, low=1)
        check_range("capacity", capacity, low=1)
        self._lengths: list[tuple[int, ...]] = [(0,) * batch_size] * num_layers
        self._capacity = capacity
        self._stores: list[tuple[Tensor, Tensor] | None] = [None] * num_layers  # keys, values: each [B, C, H, K]
        self._positions: tuple[object, Tensor] | None = None
        self._slots: tuple[Tensor, int, Tensor] | None = None  # of which positions and capacity

    def lengths(self, layer_idx: int) -> tuple[int, ...]:
        """Positions stored for block `layer_idx`, for each of the B sequences."""
        return self._lengths[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The longest row, under the name Hugging Face modules look for."""
        return max(self._lengths[layer_idx])

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget in all blocks every position >= lengths[b] of sequence b; no memory moves."""
        check_range("length", min(lengths), low=0)
        if len(lengths) == 1:
            length = lengths[0]
            self._lengths = [(min(filled[0], length),) for filled in self._lengths]
        else:
            self._lengths = [tuple(map(min, filled, lengths)) for filled in self._lengths]

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep only these sequences, in this order."""
        index = torch.tensor(rows)
        for layer_idx, store in enumerate(self._stores):
            self._lengths[layer_idx] = tuple(self._lengths[layer_idx][row] for row in rows)
            if store is not None:
                keys_BCHK, values_BCHK = store
                index = index.to(keys_BCHK.device)  # sent there once
                self._stores[layer_idx] = keys_BCHK.index_select(0, index), values_BCHK.index_select(0, index)

    def next_positions(self, layer_idx: int, num_new: int, *, device: torch.device) -> Tensor:
        """Where `num_new` further positions of each row would lie in block `layer_idx` [B, T].

        Sent to the device once for all blocks that are filled alike.
        """
        key = self._lengths[layer_idx], num_new, device
        if self._positions is None or self._positions[0] != key:
            starts_B1 = torch.tensor(self._lengths[layer_idx], device=device)[:, None]
            self._positions = key, starts_B1 + torch.arange(num_new, device=device)
        return self._positions[1]

    def append(self, key_BTHK: Tensor, value_BTHK: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append T positions to every row of block `layer_idx`, each where that row ends.

        Args:
            key_BTHK: New keys [B, T, H, K], rotated.
            value_BTHK: New values [B, T, H, K].
            layer_idx: The block, 0..num_layers-1.

        Returns:
            Views of the block's keys and values, each [B, H, S, K]; S is the longest row after appending. Beyond its
            own length a row holds what was left there: masks hide it.
        """
        starts, num_new = self._lengths[layer_idx], key_BTHK.shape[1]
        stop = max(starts) + num_new
        keys_BCHK, values_BCHK = self._room(stop, like_BTHK=key_BTHK, layer_idx=layer_idx)
        if min(starts) == max(starts):
            keys_BCHK[:, stop - num_new : stop] = key_BTHK
            values_BCHK[:, stop - num_new : stop] = value_BTHK
        else:
            positions_BT = self.next_positions(layer_idx, num_new, device=keys_BCHK.device)
            slots = self._flat_slots(positions_BT, capacity=keys_BCHK.shape[1])
            keys_BCHK.flatten(0, 1).index_copy_(0, slots, key_BTHK.flatten(0, 1))
            values_BCHK.flatten(0, 1).index_copy_(0, slots, value_BTHK.flatten(0, 1))
        self._lengths[layer_idx] = tuple(start + num_new for start in starts)
        return keys_BCHK[:, :stop].transpose(1, 2), values_BCHK[:, :stop].transpose(1, 2)

    def update(self, key_BHTK: Tensor, value_BHTK: Tensor, layer_idx: int, **_: object) -> tuple[Tensor, Tensor]:
        """`append` as Hugging Face attention modules call it: with heads before positions.

        What else they pass (since 5.24 their own arguments, as `kwargs`) concerns caches that choose what to keep.
        """
        return self.append(key_BHTK.transpose(1, 2), value_BHTK.transpose(1, 2), layer_idx)

    def _room(self, needed: int, *, like_BTHK: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """The block's store with room for `needed` positions; block by block, so that little exists twice."""
        store = self._stores[layer_idx]
        if store is not None and store[0].shape[1] >= needed:
            return store
        batch, _, heads, width = like_BTHK.shape
        capacity = self._capacity if store is None else store[0].shape[1] + max(_GROWTH, store[0].shape[1] // 2)
        shape = batch, max(needed, capacity), heads, width
        # Masks hide what a short row has beyond its end by adding -inf, which does not hide a NaN of unwritten memory.
        new_store = like_BTHK.new_zeros if batch > 1 else like_BTHK.new_empty
        fresh = new_store(shape), new_store(shape)
        if store is not None:
            for new, old in zip(fresh, store, strict=True):
                new[:, : old.shape[1]] = old
        self._stores[layer_idx] = fresh
        return fresh

    def _flat_slots(self, positions_BT: Tensor, *, capacity: int) -> Tensor:
        """Indices [B * T] of the new positions in a store seen as one long row; the same for every block of a span."""
        if self._slots is None or self._slots[0] is not positions_BT or self._slots[1] != capacity:
            rows_B1 = torch.arange(len(positions_BT), device=positions_BT.device)[:, None]
            self._slots = positions_BT, capacity, (rows_B1 * capacity + positions_BT).flatten()
        return self._slots[2]
