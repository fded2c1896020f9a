"""Stores keys and values of every block: they are written by index, read as views, and truncated without a copy.

Shape legend: `B` sequences, `H` key/value heads, `T` new positions, `S` stored positions, `C` capacity, `K` head width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor

from app.errors import ConfigError, check_range

_GROWTH = 256  # the fewest positions by which a full store grows


class KeyValueCache:
    """Keys and values of every block; implements protocols.DecoderCache.

    Position p of a sequence is at index p of its row, whatever the other rows hold. Rows may differ in length, and
    blocks too, so that drafting can run ahead in the first blocks. A block allocates `capacity` positions a row at its
    first `append`, which knows the shape, type and device of the keys; a full store grows by half.
    """

    def __init__(self, *, num_layers: int, batch_size: int = 1, capacity: int) -> None:
        self._lengths: list[tuple[int, ...]] = [(0,) * batch_size] * num_layers
        self._capacity = capacity
        self._stores: list[tuple[Tensor, Tensor] | None] = [None] * num_layers  # keys, values: each [B, C, H, K]
        self._positions: tuple[object, Tensor] | None = None
        self._slots: tuple[Tensor, int, Tensor] | None = None  # positions, capacity, slots
        self.tables: Any = None  # rotary tables that captured rounds read, kept in memory by this reference

    @property
    def masked_capacity(self) -> int | None:
        """Positions of a row that every pass sees through a mask; None where it sees those that are stored."""
        return None

    def lengths(self, layer_idx: int) -> tuple[int, ...]:
        """Positions stored for block `layer_idx`, for each of the B sequences."""
        return self._lengths[layer_idx]

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
            lengths = self._lengths[layer_idx]
            self._lengths[layer_idx] = tuple(lengths[row] for row in rows)
            if store is not None:
                index, stop = index.to(store[0].device), max(lengths)  # copied to the device once
                shape = len(rows), *store[0].shape[1:]
                fresh = _unwritten(shape, like=store[0]), _unwritten(shape, like=store[0])
                for new, old in zip(fresh, store, strict=True):
                    new[:, :stop] = old[:, :stop].index_select(0, index)
                self._stores[layer_idx] = fresh

    def join(self, other: Self) -> None:
        """Take over the sequences of another cache, as rows after one's own; blocks that both lack stay empty."""
        for layer_idx, stores in enumerate(zip(self._stores, other._stores, strict=True)):
            parts = self._lengths[layer_idx], other._lengths[layer_idx]
            self._lengths[layer_idx] = parts[0] + parts[1]
            if stores == (None, None):
                continue
            filled = [store for store in stores if store is not None]
            assert len(filled) == 2, "a block that only one of the caches has run"
            _, capacity, heads, width = map(max, filled[0][0].shape, filled[1][0].shape)
            shape, num_own = (sum(map(len, parts)), capacity, heads, width), len(parts[0])
            fresh = _unwritten(shape, like=filled[0][0]), _unwritten(shape, like=filled[0][0])
            for new, own, joining in zip(fresh, *filled, strict=True):
                new[:num_own, : max(parts[0])] = own[:, : max(parts[0])]
                new[num_own:, : max(parts[1])] = joining[:, : max(parts[1])]
            self._stores[layer_idx] = fresh

    def next_positions(self, layer_idx: int, num_new: int, *, device: torch.device) -> Tensor:
        """The next `num_new` positions of each row in block `layer_idx` [B, T].

        They are copied to the device once for all blocks that are filled alike.
        """
        key = self._lengths[layer_idx], num_new, device
        if self._positions is None or self._positions[0] != key:
            starts_B1 = torch.tensor(self._lengths[layer_idx], device=device)[:, None]
            self._positions = key, starts_B1 + torch.arange(num_new, device=device)
        return self._positions[1]

    def append(self, key_BTHK: Tensor, value_BTHK: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append rotated keys and values [B, T, H, K] of T positions at the end of every row of block `layer_idx`.

        Returns:
            Views of the block's keys and values, each [B, H, S, K], where S is the length of the longest row. Beyond
            its own length a row holds arbitrary values, which masks hide.
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
        """Append as Hugging Face attention modules ask for it, with heads before positions.

        Their further arguments concern caches that choose what to keep.
        """
        return self.append(key_BHTK.transpose(1, 2), value_BHTK.transpose(1, 2), layer_idx)

    def _room(self, needed: int, *, like_BTHK: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """The block's store, enlarged if it lacks room for `needed` positions."""
        store = self._stores[layer_idx]
        if store is not None and store[0].shape[1] >= needed:
            return store
        batch, _, heads, width = like_BTHK.shape
        capacity = self._capacity if store is None else store[0].shape[1] + max(_GROWTH, store[0].shape[1] // 2)
        shape = batch, max(needed, capacity), heads, width
        with shortage_told(f"dynamic with room for {batch} x {shape[1]} positions"):
            fresh = _unwritten(shape, like=like_BTHK), _unwritten(shape, like=like_BTHK)
        if store is not None:
            for new, old in zip(fresh, store, strict=True):
                new[:, : old.shape[1]] = old
        self._stores[layer_idx] = fresh
        return fresh

    def _flat_slots(self, positions_BT: Tensor, *, capacity: int) -> Tensor:
        """Indices [B * T] of the new positions in a store seen as one long row; all blocks of a span share them."""
        if self._slots is None or self._slots[0] is not positions_BT or self._slots[1] != capacity:
            rows_B1 = torch.arange(len(positions_BT), device=positions_BT.device)[:, None]
            self._slots = positions_BT, capacity, (rows_B1 * capacity + positions_BT).flatten()
        return self._slots[2]


@contextmanager
def shortage_told(got: str) -> Iterator[None]:
    """Raise a ConfigError about an engine where memory is too small. On a CPU, torch tells so only by its words."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)):
            raise
        fix = "give fewer prompts at a time or a smaller max_new_tokens"
        raise ConfigError("engine", got=got, allowed="what the device's memory holds", fix=fix) from error


def _unwritten(shape: Sequence[int], *, like: Tensor) -> Tensor:
    """A store of this shape [B, C, H, K], of the type and on the device of `like`.

    Masks add -inf to what a short row has beyond its end, which does not hide a NaN of memory that was never written;
    a single row ends where the store is read.
    """
    return like.new_zeros(shape) if shape[0] > 1 else like.new_empty(shape)
