"""Tokens a second, share of block computations saved by layer dropout, and peak memory, while training."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from app import metric_names
from app.errors import check_range
from app.protocols import LayerDropoutHost


class ThroughputMonitor(Callback):
    """Logs means over a window of optimizer steps; time spent in validation and checkpoints does not count.

    Args:
        every_n_steps: Window in optimizer steps, >= 1.
    """

    def __init__(self, *, every_n_steps: int = 10) -> None:
        check_range("every_n_steps", every_n_steps, low=1)
        self.every_n_steps = every_n_steps
        self._reset()

    def _reset(self) -> None:
        self._tokens, self._seconds, self._saved, self._batches = 0, 0.0, 0.0, 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock of this micro-batch."""
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the micro-batch; at the end of a window, log."""
        if pl_module.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        self._seconds += time.perf_counter() - self._start
        self._tokens += batch["input_ids"].numel() * trainer.world_size
        self._batches += 1
        if isinstance(pl_module, LayerDropoutHost):
            self._saved += sum(pl_module.dropped_shares) / pl_module.num_layers
        window = self.every_n_steps * trainer.accumulate_grad_batches
        if self._batches % window:
            return
        pl_module.log(metric_names.TOKENS_PER_SECOND, self._tokens / self._seconds)
        pl_module.log(metric_names.BLOCKS_SAVED_SHARE, self._saved / self._batches)
        pl_module.log(metric_names.MEMORY_GIB, _peak_memory_gib(pl_module.device))
        self._reset()


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
