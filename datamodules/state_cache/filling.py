"""Fill a cache with one pass of the frozen model, shard by shard, from where an earlier process was cut off.

Shape legend: `B`, `N` rows of a batch and of a shard, `T` tokens a row, `S` states a token, `D` model width.

Memory holds the model, the states of one forward, those of one shard and its bytes; of the other rows, none.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedModel

from app.errors import ConfigError
from app.model.early_exit import EarlyExitModel
from app.progress_log import ProgressLog
from app.words import dtype_name
from datamodules.state_cache.shards import TOKEN_COLUMNS, RowLayout, Split, StateCache

_log = logging.getLogger(__name__)


class FrozenModel:
    """The states of a model for rows of a corpus, computed on `device` with products in `compute_dtype`."""

    def __init__(
        self, model: PreTrainedModel, *, exit_layers: Sequence[int], device: torch.device, compute_dtype: torch.dtype
    ) -> None:
        self._network, self._exit_layers = EarlyExitModel(model.to(device).eval()), exit_layers
        self._device, self._compute_dtype = device, compute_dtype

    @torch.inference_mode()
    def states(self, input_ids_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
        """[B, T, S, D], on the CPU: for each exit E the state leaving block E - 1, then the one after the final norm.

        Position ids restart at 0 with each document, and attention does not cross a restart.
        """
        rows = (input_ids_BT.to(self._device), position_ids_BT.to(self._device))
        lower = self._compute_dtype is not torch.float32
        with torch.autocast(self._device.type, dtype=self._compute_dtype, enabled=lower):
            by_exit = self._network.states(*rows, self._exit_layers)
        return torch.stack([by_exit[exit_layer] for exit_layer in sorted(by_exit)], dim=2).cpu()


class CacheFiller:
    """Make those shards of a cache that are `missing`: rows of each, by name; ConfigError if the disk has no room."""

    def __init__(self, cache: StateCache, layout: RowLayout, missing: Mapping[str, int]) -> None:
        self._cache, self._layout, self._missing = cache, layout, missing
        num_rows = sum(missing.values())
        size, free = num_rows * layout.row_bytes, shutil.disk_usage(cache.folder).free
        num_tokens = num_rows * layout.seq_len
        self._progress = ProgressLog(_log, "cached", total=num_tokens, unit="tokens")
        if size > free:
            raise ConfigError(
                "cache_dir",
                got=str(cache.folder),
                allowed=f"a folder on a disk with {size / 1e6:,.3g} MB free; this one has {free / 1e6:,.3g} MB",
                fix="lower num_tokens, take fewer exits or a dtype of 16 bits, or name a folder on another disk",
            )
        cache.write_index()
        figures = f"{layout.num_states} states of each of {num_tokens:,} tokens: {size / 1e6:,.3g} MB"
        _log.info("caching %s in %s", figures, cache.folder)

    def fill(self, split: Split, num_rows: int, *, batches: Iterator[Mapping[str, Tensor]], model: FrozenModel) -> None:
        """Make the missing shards of a split of `num_rows` rows; `batches` yields their columns from the first row on.

        The same rows go through the model together whatever is missing, so that a cache which was cut off ends up with
        the same bytes.
        """
        layout, shards = self._layout, self._layout.shards(split, num_rows)
        while shards and next(reversed(shards)) not in self._missing:
            shards.popitem()
        for name, in_shard in shards.items():
            read = list(islice(batches, -(-in_shard // layout.batch_size)))
            if name not in self._missing:
                continue
            columns = {column: torch.cat([batch[column] for batch in read])[:in_shard] for column in TOKEN_COLUMNS}
            found_NTSD = torch.empty(in_shard, layout.seq_len, layout.num_states, layout.width, dtype=layout.dtype)
            for start in range(0, in_shard, layout.batch_size):
                rows = slice(start, start + layout.batch_size)
                found_NTSD[rows] = model.states(columns["input_ids"][rows], columns["position_ids"][rows])
                if not torch.isfinite(found_NTSD[rows]).all():
                    allowed = "a type that holds all states of this model (bfloat16 reaches as far as float32)"
                    raise ConfigError("dtype", got=dtype_name(layout.dtype), allowed=allowed)
                number = columns["input_ids"][rows].numel()
                self._progress.add(number, num_tokens=number)
            tokens = {column: values.int() for column, values in columns.items()}
            self._cache.write_shard(name, {**tokens, "states": found_NTSD})
