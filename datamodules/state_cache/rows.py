"""Rows read from the shards of a cache, which are mapped: memory holds the pages that the system keeps for files.

Shape legend: `B` rows, `T` tokens a row, `S` states a token, `D` model width.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from app.layerskip.early_exit_loss import IGNORE_INDEX

Row = dict[str, Tensor]


class CachedRows(Dataset[Row]):
    """Rows of shards, of each as many as `files` says; each process maps the shards that it reads."""

    def __init__(self, files: Mapping[Path, int], *, seq_len: int) -> None:
        self._files = [*files]
        self._ends = [0, *accumulate(files.values())]
        self._maps: dict[int, Row] = {}
        self._seq_len = seq_len

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row, which are as many in all."""
        return np.full(len(self), self._seq_len)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, row: int) -> Row:
        """`input_ids`, `labels`, `position_ids` [T], `source` [] and `states` [T, S, D], as maps of their file."""
        shard = bisect_right(self._ends, row) - 1
        if shard not in self._maps:
            self._maps[shard] = load_file(self._files[shard])
        return {name: column[row - self._ends[shard]] for name, column in self._maps[shard].items()}

    def collate(self, rows: Sequence[Row]) -> Row:
        """A batch: `input_ids`, `labels`, `position_ids` [B, T], `source` [B], int64, and `states` [B, T, S, D].

        No rows give a batch of one row without a target, for a rank that has nothing to train on in a step.
        """
        rows = rows or [{**self[0], "labels": torch.full((self._seq_len,), IGNORE_INDEX)}]
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return {name: column if name == "states" else column.long() for name, column in batch.items()}
