"""Fill a cache with one pass of the frozen model, shard by shard, from where an earlier process was cut off.

Shape legend: `N` rows, `T` tokens a row, `S` states a token, `D` model width.

Memory holds the model, the states of one forward, those of one shard and its bytes; of the other rows, none.
"""

import logging
import shutil
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedModel

from app.errors import ConfigError
from app.model.early_exit import EarlyExitModel
from app.words import dtype_name
from datamodules.state_cache.shards import TOKEN_COLUMNS, RowLayout, Split, StateCache

_log = logging.getLogger(__name__)

Batch = Mapping[str, Tensor]  # of a corpus: TOKEN_COLUMNS
_SECONDS_A_REPORT = 30.0


class FrozenModel:
    """The states of a model for rows of a corpus, computed on `device` with products in `compute_dtype`."""

    def __init__(
        self, model: PreTrainedModel, *, exit_layers: Sequence[int], device: torch.device, compute_dtype: torch.dtype
    ) -> None:
        self._network, self._exit_layers = EarlyExitModel(model.to(device).eval()), exit_layers
        self._device, self._compute_dtype = device, compute_dtype

    @torch.inference_mode()
    def states(self, input_ids_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
        """[B, T, S, D], on the CPU: for each exit E the state leaving block E - 1, then the state after the final norm.

        Position ids restart at 0 with each document, and attention does not cross a restart.
        """
        rows = (input_ids_BT.to(self._device), position_ids_BT.to(self._device))
        lower = self._compute_dtype is not torch.float32
        with torch.autocast(self._device.type, dtype=self._compute_dtype, enabled=lower):
            by_exit = self._network.states(*rows, self._exit_layers)
        return torch.stack([by_exit[exit_layer] for exit_layer in sorted(by_exit)], dim=2).cpu()


class Progress:
    """Log how fast rows are cached and how long the others will take."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens, self._done = num_tokens, 0
        self._start = self._reported = time.perf_counter()

    def add(self, num_tokens: int) -> None:
        self._done += num_tokens
        now = time.perf_counter()
        rate = self._done / (now - self._start)
        if self._done >= self._num_tokens:
            _log.info("cached %s tokens in %.0f s: %.0f tokens/s", f"{self._done:,}", now - self._start, rate)
        elif now - self._reported >= _SECONDS_A_REPORT:
            self._reported, left = now, (self._num_tokens - self._done) / rate / 60
            figures = f"{self._done:,} of {self._num_tokens:,} tokens, {rate:,.0f} tokens/s, {left:,.1f} minutes left"
            _log.info("cached %s", figures)


def check_room(cache: StateCache, num_bytes: int) -> None:
    """Raise ConfigError if the disk has no room for so many bytes more."""
    free = shutil.disk_usage(cache.folder).free
    if num_bytes > free:
        raise ConfigError(
            "cache_dir",
            got=str(cache.folder),
            allowed=f"a folder on a disk with {num_bytes / 1e6:,.3g} MB free; this one has {free / 1e6:,.3g} MB",
            fix="lower num_tokens, take fewer exits or a dtype of 16 bits, or name a folder on another disk",
        )


def fill(
    cache: StateCache,
    split: Split,
    num_rows: int,
    *,
    layout: RowLayout,
    missing: Container[str],
    batches: Iterator[Batch],
    model: FrozenModel,
    progress: Progress,
) -> None:
    """Make those shards of a split that are `missing`; `batches` are the corpus's from its first row on.

    The same rows go through the model together whatever is missing, so that a cache which was cut off ends up with the
    same bytes.
    """
    for name, rows_here in layout.shards(split, num_rows).items():
        num_batches = -(-rows_here // layout.batch_size)
        of_shard = list(islice(batches, num_batches))
        if name not in missing:
            continue
        columns = {column: torch.cat([batch[column] for batch in of_shard])[:rows_here] for column in TOKEN_COLUMNS}
        shape = (rows_here, layout.seq_len, layout.num_states, layout.width)
        found_NTSD = torch.empty(shape, dtype=layout.dtype)
        for start in range(0, rows_here, layout.batch_size):
            rows = slice(start, min(start + layout.batch_size, rows_here))
            found_NTSD[rows] = model.states(columns["input_ids"][rows], columns["position_ids"][rows])
            _check_finite(found_NTSD[rows])
            progress.add(columns["input_ids"][rows].numel())
        tokens = {column: values.int() for column, values in columns.items()}
        cache.write_shard(name, {**tokens, "states": found_NTSD})


def _check_finite(states: Tensor) -> None:
    if not torch.isfinite(states).all():
        allowed = "a type that holds all states of this model (bfloat16 reaches as far as float32)"
        raise ConfigError("dtype", got=dtype_name(states.dtype), allowed=allowed)
