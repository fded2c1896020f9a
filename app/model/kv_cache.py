"""One key/value store for all blocks: written by index, read as views, truncated by moving a number.

Shape legend: `N` blocks, `B` sequences, `H` key/value heads, `T` new positions, `S` stored positions, `C` capacity,
`K` head width.
"""

from __future__ import annotations

from torch import Tensor

from app.errors import check_range


class KeyValueCache:
    """Keys and values of every block; implements protocols.DecoderCache.

    Hugging Face attention modules take it as `past_key_values`: all they call is `update`. Blocks may be filled to
    different lengths, which is what lets drafting run ahead in the first blocks.

    Args:
        num_layers: Number of blocks, at least 1.
        capacity: Positions to reserve, at least 1; a full store doubles. Memory is taken at the first `update`,
            which is where the shape, type and device of the keys are learned.
    """

    def __init__(self, *, num_layers: int, capacity: int) -> None:
        check_range("num_layers", num_layers, low=1)
        check_range("capacity", capacity, low=1)
        self._lengths = [0] * num_layers
        self._capacity = capacity
        self._keys_BHCK: list[Tensor] = []
        self._values_BHCK: list[Tensor] = []

    def length(self, layer_idx: int) -> int:
        """Number of positions stored for block `layer_idx`."""
        return self._lengths[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """`length` under the name Hugging Face modules look for."""
        return self._lengths[layer_idx]

    def truncate(self, length: int) -> None:
        """Forget every position >= `length` in all blocks; no memory moves."""
        check_range("length", length, low=0)
        self._lengths = [min(filled, length) for filled in self._lengths]

    def update(self, key_BHTK: Tensor, value_BHTK: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append T positions to block `layer_idx`.

        Args:
            key_BHTK: New keys [B, H, T, K], rotated.
            value_BHTK: New values [B, H, T, K].
            layer_idx: The block, 0..num_layers-1.

        Returns:
            Views of all keys and values of the block, each [B, H, S, K], S being the length after appending.
        """
        start = self._lengths[layer_idx]
        stop = start + key_BHTK.shape[2]
        if not self._keys_BHCK or stop > self._capacity:
            self._reserve(stop, like_BHTK=key_BHTK)
        keys_BHCK, values_BHCK = self._keys_BHCK[layer_idx], self._values_BHCK[layer_idx]
        keys_BHCK[:, :, start:stop] = key_BHTK
        values_BHCK[:, :, start:stop] = value_BHTK
        self._lengths[layer_idx] = stop
        return keys_BHCK[:, :, :stop], values_BHCK[:, :, :stop]

    def _reserve(self, needed: int, *, like_BHTK: Tensor) -> None:
        """Take one store for all blocks with room for `needed` positions, and move what is there into it."""
        if needed > self._capacity:
            self._capacity = max(needed, 2 * self._capacity)
        batch, heads, _, width = like_BHTK.shape
        store_2NBHCK = like_BHTK.new_empty(2, len(self._lengths), batch, heads, self._capacity, width)
        keys_BHCK, values_BHCK = list(store_2NBHCK[0].unbind()), list(store_2NBHCK[1].unbind())
        for layer_idx, filled in enumerate(self._lengths if self._keys_BHCK else ()):
            keys_BHCK[layer_idx][:, :, :filled] = self._keys_BHCK[layer_idx][:, :, :filled]
            values_BHCK[layer_idx][:, :, :filled] = self._values_BHCK[layer_idx][:, :, :filled]
        self._keys_BHCK, self._values_BHCK = keys_BHCK, values_BHCK
