"""Tokens a second, model FLOPs utilisation, block computations saved by layer dropout, and peak memory, in training."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from app import metric_names
from app.data_ranks import data_ranks
from app.errors import ConfigError, check_range
from app.planning.step import Micro, MicroBatchCosts, build_fake, measure_micro_batch
from app.protocols import ArchitectureOwner, EarlyExitHost, LayerDropoutHost


class ThroughputMonitor(Callback):
    """Logs means over a window of optimizer steps, by the clock on the wall.

    Waiting for data counts, and so does writing checkpoints; validation, from its start to its end, does not. What
    passes between two micro-batches is logged as waiting for data, unless a checkpoint was written there: of such a
    pause nobody can tell how long the data took, so it is in no share.

    Args:
        every_n_steps: Window in optimizer steps, >= 1; by default trainer.log_every_n_steps, so that every step is in
            one figure and every figure is logged once.
        peak_flops: What one device can do at best in the precision of the run, FLOP/s (an H100's bf16: 989e12); the
            share of it that the model's forward and backward got is then logged. Blocks that were dropped and exits
            that were off do not count; what activation checkpointing computes again does not either.
    """

    def __init__(self, *, every_n_steps: int | None = None, peak_flops: float | None = None) -> None:
        check_range("every_n_steps", 1 if every_n_steps is None else every_n_steps, low=1)
        if peak_flops is not None:
            check_range("peak_flops", peak_flops, low=1)
        self.every_n_steps, self.peak_flops = every_n_steps, peak_flops
        self._costs: MicroBatchCosts | None = None
        self._step = 0
        self._reset()
        self._begin_pause()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a model whose operations cannot be counted."""
        if self.peak_flops is not None and not isinstance(pl_module, ArchitectureOwner):
            got = type(pl_module).__name__
            raise ConfigError("model", got=got, allowed="a protocols.ArchitectureOwner with peak_flops")

    def _reset(self) -> None:
        self._tokens, self._flops, self._batches, self._pauses = 0, 0.0, 0, 0
        self._computing = self._waiting = self._saving = 0.0  # seconds
        self._saved = self._skipped = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Windows end at multiples of their length, also where a run was resumed between two."""
        self._step = trainer.global_step
        self._reset()
        self._begin_pause()

    def _begin_pause(self) -> None:
        self._since, self._has_saved = time.perf_counter(), False

    def _end_pause(self, *, is_for_data: bool) -> None:
        seconds = time.perf_counter() - self._since
        if is_for_data:
            self._waiting, self._pauses = self._waiting + seconds, self._pauses + 1
        else:
            self._saving += seconds

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """This pause is not for data alone."""
        self._has_saved = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Up to here callbacks that come after this one have worked, checkpoints among them."""
        self._end_pause(is_for_data=False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What comes now counts again."""
        self._begin_pause()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """End the pause before this micro-batch."""
        self._end_pause(is_for_data=not self._has_saved)
        if self.peak_flops is not None and self._costs is None:
            assert isinstance(pl_module, ArchitectureOwner)
            rows, length = batch["input_ids"].shape
            micro = Micro(batch_size=rows, seq_len=length, num_exits=2)
            self._costs, self._measured_tokens = (
                measure_micro_batch(*build_fake(pl_module.config, dtype=torch.float32), micro),
                rows * length,
            )
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the micro-batch; at the end of a window, log."""
        window = self.every_n_steps or trainer.log_every_n_steps or 1  # type: ignore[attr-defined]
        closes = trainer.global_step > self._step and trainer.global_step % window == 0
        self._step = trainer.global_step
        self._batches += 1
        if pl_module.device.type == "cuda" and closes:  # steps wait for the device themselves
            torch.cuda.current_stream().synchronize()
        self._computing += time.perf_counter() - self._start
        self._begin_pause()
        tokens = batch["input_ids"].numel()
        self._tokens += tokens
        kept_shares = [1.0]
        if isinstance(pl_module, LayerDropoutHost):
            dropped = pl_module.dropped_shares
            kept_shares = [1.0 - share for share in dropped]
            self._saved += sum(dropped) / len(dropped)
            self._skipped += dropped.count(1.0) / len(dropped)
        if self._costs is not None and isinstance(pl_module, EarlyExitHost):
            flops = self._costs.flops(num_exits=len(pl_module.exit_weights), kept_shares=kept_shares)
            self._flops += flops * tokens / self._measured_tokens
        if not closes:
            return
        replicas = data_ranks(trainer).num_replicas
        seconds = self._computing + self._waiting + self._saving
        pl_module.log(metric_names.TOKENS_PER_SECOND, self._tokens * replicas / seconds)
        if self._pauses:
            waiting, computing = self._waiting / self._pauses, self._computing / self._batches
            pl_module.log(metric_names.DATA_WAIT_SHARE, waiting / (waiting + computing))
        pl_module.log(metric_names.BLOCKS_SAVED_SHARE, self._saved / self._batches)
        pl_module.log(metric_names.BLOCKS_SKIPPED_SHARE, self._skipped / self._batches)
        pl_module.log(metric_names.MEMORY_GIB, _peak_memory_gib(pl_module.device))
        if self.peak_flops is not None:
            per_device = self._flops * replicas / trainer.world_size / seconds
            pl_module.log(metric_names.MODEL_FLOPS_UTILISATION, per_device / self.peak_flops)
        self._reset()


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
