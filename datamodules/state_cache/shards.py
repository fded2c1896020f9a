"""The folder of a cache: shards of rows, and an index of what they were made from and what their bytes are.

Shape legend: `N` rows of a shard, `B` rows, `T` tokens a row, `S` states a token, `D` model width.

A shard is a safetensors file of `input_ids`, `labels`, `position_ids` [N, T] and `source` [N], int32, and `states`
[N, T, S, D]. It appears whole or not at all, and its checksum enters INDEX_FILE behind it. So a process that is killed
at any moment leaves shards that are whole, and at most one that the index does not know, which is made anew.
"""

import json
import logging
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import Dataset

from app.checkpoints.integrity import Checksum, checksum_of
from app.checkpoints.run_lock import lock
from app.errors import ConfigError, DataError
from app.layerskip.early_exit_loss import IGNORE_INDEX
from app.whole_file import write_whole

_log = logging.getLogger(__name__)

CachedRow = dict[str, Tensor]
Split = Literal["train", "validation"]

INDEX_FILE = "index.json"
TOKEN_COLUMNS = ("input_ids", "labels", "position_ids", "source")
_LOCK_FILE = ".lock"
_FORMAT = 1  # raise it when the same settings give other shards
_TOKEN_BYTES = 4
_SHARD_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class RowLayout:
    """What a cache holds of each row."""

    seq_len: int  # T
    num_states: int  # S
    width: int  # D
    dtype: torch.dtype
    batch_size: int  # rows that go through the model at a time; a shard holds a whole number of such batches

    @property
    def row_bytes(self) -> int:
        states = self.num_states * self.width * self.dtype.itemsize
        return self.seq_len * (states + 3 * _TOKEN_BYTES) + _TOKEN_BYTES

    def shards(self, split: Split, num_rows: int) -> dict[str, int]:
        """Count the rows of each shard of a split, by shard name: 64 MiB of them, or one batch if that is more."""
        size = self.batch_size * max(1, _SHARD_BYTES // (self.batch_size * self.row_bytes))
        starts = range(0, num_rows, size)
        return {f"{split}-{start // size:06}.safetensors": min(size, num_rows - start) for start in starts}


class Shard(NamedTuple):
    """What the index says of a shard."""

    num_rows: int
    checksum: Checksum


@dataclass
class StateCache:
    """The cache in a folder, as its index describes it."""

    folder: Path
    made_from: Mapping[str, Any]  # all that its rows depend on, by name, as JSON has it
    num_validation_rows: int
    shards: dict[str, Shard]  # by file name

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Return the cache in a folder, or None if there is none; DataError says that its index is damaged."""
        file = folder / INDEX_FILE
        if not file.exists():
            return None
        try:
            index = json.loads(file.read_text("utf-8"))
            shards = {
                name: Shard(shard["num_rows"], Checksum(shard["num_bytes"], shard["crc32"]))
                for name, shard in index["shards"].items()
            }
            return cls(folder, dict(index["made_from"]), int(index["num_validation_rows"]), shards)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{file} is damaged: remove the folder, or name another with data.cache_dir") from error

    def check_made_from(self, now: Mapping[str, Any]) -> None:
        """Raise ConfigError, naming what differs, unless the cache was made from the same."""
        for name in sorted(self.made_from.keys() | now.keys()):
            if (before := self.made_from.get(name)) != now.get(name):
                allowed = f"a cache with {name} {now.get(name)!r}; this one has {before!r}"
                fix = "name another cache_dir, or remove the folder"
                raise ConfigError("cache_dir", got=str(self.folder), allowed=allowed, fix=fix)

    def has(self, name: str, num_rows: int) -> bool:
        """Tell whether a shard has that many rows and its bytes; a warning says that they are not those written."""
        shard, file = self.shards.get(name), self.folder / name
        if shard is None or shard.num_rows < num_rows or not file.is_file():
            return False
        if checksum_of(file) == shard.checksum:
            return True
        _log.warning("%s is truncated or damaged: it is made anew", file)
        return False

    def files(self, split: Split, num_rows: int) -> dict[Path, int]:
        """Return the shards with the first rows of a split, and how many each has; DataError says that some lack."""
        found, left = dict[Path, int](), num_rows
        for name, shard in sorted(self.shards.items()):
            if name.startswith(split):
                found[self.folder / name] = min(shard.num_rows, left)
                left -= found[self.folder / name]
        if left:
            raise DataError(f"{self.folder}: {left} {split} rows are not cached yet; prepare_data fills the cache")
        return found

    def write_shard(self, name: str, rows: Mapping[str, Tensor]) -> None:
        content = save(dict(rows))
        write_whole(self.folder / name, content)
        self.shards[name] = Shard(len(rows["states"]), Checksum(len(content), zlib.crc32(content)))
        self.write_index()

    def write_index(self) -> None:
        shards = {
            name: {"num_rows": shard.num_rows, **shard.checksum._asdict()}
            for name, shard in sorted(self.shards.items())
        }
        index = {"made_from": self.made_from, "num_validation_rows": self.num_validation_rows, "shards": shards}
        write_whole(self.folder / INDEX_FILE, json.dumps(index, indent=1))


def made_from(**facts: Any) -> dict[str, Any]:
    """Return what a cache depends on, as JSON has it; nested facts get names of their own, such as `corpus seed`."""
    flat: dict[str, Any] = {"format": _FORMAT}
    for name, value in facts.items():
        flat |= {f"{name} {key}": each for key, each in value.items()} if isinstance(value, Mapping) else {name: value}
    plain: dict[str, Any] = json.loads(json.dumps(flat))
    return plain


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Make the folder, and wait until no other process fills it; the kernel ends the lock with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK_FILE).open("w") as file:
        if not lock(file.fileno(), folder):
            _log.info("another process fills %s: waiting for it", folder)
            lock(file.fileno(), folder, wait=True)
        yield


class CachedRows(Dataset[CachedRow]):
    """Rows of shards, of each as many as `files` says; each process maps the shards that it reads."""

    def __init__(self, files: Mapping[Path, int], *, seq_len: int) -> None:
        self._files = [*files]
        self._ends = [0, *accumulate(files.values())]
        self._maps: dict[int, CachedRow] = {}
        self._seq_len = seq_len

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row, which are as many in all."""
        return np.full(len(self), self._seq_len)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, row: int) -> CachedRow:
        """`input_ids`, `labels`, `position_ids` [T], `source` [] and `states` [T, S, D], as maps of their file."""
        shard = bisect_right(self._ends, row) - 1
        if shard not in self._maps:
            self._maps[shard] = load_file(self._files[shard])
        return {name: column[row - self._ends[shard]] for name, column in self._maps[shard].items()}

    def collate(self, rows: Sequence[CachedRow]) -> CachedRow:
        """Return a batch: `input_ids`, `labels`, `position_ids` [B, T], `source` [B], int64, and `states` [B, T, S, D].

        No rows give a batch of one row without a target, for a rank that has nothing to train on in a step.
        """
        rows = rows or [{**self[0], "labels": torch.full((self._seq_len,), IGNORE_INDEX)}]
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return {name: column if name == "states" else column.long() for name, column in batch.items()}
