"""Log speed, FLOPs utilisation, blocks saved and memory. Tested by tests/integration/test_monitors.py."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from app import metric_names
from app.data_ranks import data_ranks
from app.errors import ConfigError, check_range
from app.model.process_memory import peak_memory
from app.planning.step import Micro, MicroBatchCosts, build_fake, measure_micro_batch
from app.protocols import ArchitectureOwner, EarlyExitHost, FrozenModelHost, LayerDropoutHost


@dataclass
class _Window:
    """Sums over the micro-batches of a window; computing, waiting and saving are seconds."""

    tokens: int = 0
    batches: int = 0
    pauses: int = 0  # waits for data that were timed
    flops: float = 0.0
    computing: float = 0.0
    waiting: float = 0.0
    saving: float = 0.0
    saved_shares: float = 0.0
    skipped_shares: float = 0.0


class ThroughputMonitor(Callback):
    """Log means over a window of optimizer steps, by wall-clock time.

    Waiting for data and writing checkpoints count; validation does not. The time between two micro-batches is logged
    as waiting for data, unless a checkpoint was written then: nobody can tell how long the data took of such a pause,
    so it is in no share.

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
        self._window = _Window()
        self._begin_pause()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.peak_flops is not None and not isinstance(pl_module, ArchitectureOwner):
            got = type(pl_module).__name__
            raise ConfigError("model", got=got, allowed="a protocols.ArchitectureOwner with peak_flops")
        if self.peak_flops is not None and isinstance(pl_module, FrozenModelHost) and pl_module.has_exit_blocks:
            fix = "the work that it counts is that of training the whole model"
            raise ConfigError("peak_flops", got=self.peak_flops, allowed="null with model.exit_blocks", fix=fix)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        self._window = _Window()
        self._begin_pause()

    def _begin_pause(self) -> None:
        self._since, self._has_saved = time.perf_counter(), False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._has_saved = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The time up to here counts: later callbacks have worked, those that write checkpoints among them.
        self._window.saving += time.perf_counter() - self._since

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_pause()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        seconds = time.perf_counter() - self._since
        if self._has_saved:
            self._window.saving += seconds
        else:
            self._window.waiting += seconds
            self._window.pauses += 1
        if self.peak_flops is not None and self._costs is None:
            assert isinstance(pl_module, ArchitectureOwner)
            rows, length = batch["input_ids"].shape
            micro = Micro(batch_size=rows, seq_len=length, num_exits=2)
            lora: Any = pl_module.peft if isinstance(pl_module, FrozenModelHost) else None
            self._costs = measure_micro_batch(*build_fake(pl_module.config, dtype=torch.float32, lora=lora), micro)
            self._measured_tokens = rows * length
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, _: Any, batch: Any, *rest: Any) -> None:
        # Windows end at multiples of their length, also where a run was resumed between two.
        steps = self.every_n_steps or trainer.log_every_n_steps or 1  # type: ignore[attr-defined]
        closes = trainer.global_step > self._step and trainer.global_step % steps == 0
        self._step = trainer.global_step
        if pl_module.device.type == "cuda" and closes:  # all steps before have waited for the device themselves
            torch.cuda.current_stream().synchronize()
        window = self._window
        window.batches += 1
        window.computing += time.perf_counter() - self._start
        self._begin_pause()
        tokens = batch["input_ids"].numel()
        window.tokens += tokens
        kept_shares = [1.0]
        if isinstance(pl_module, LayerDropoutHost):
            dropped = pl_module.dropped_shares
            kept_shares = [1.0 - share for share in dropped]
            window.saved_shares += sum(dropped) / len(dropped)
            window.skipped_shares += dropped.count(1.0) / len(dropped)
        if self._costs is not None and isinstance(pl_module, EarlyExitHost):
            flops = self._costs.flops(num_exits=len(pl_module.exit_weights), kept_shares=kept_shares)
            window.flops += flops * tokens / self._measured_tokens
        if closes:
            self._log(trainer, pl_module)
            self._window = _Window()

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        window, num_replicas = self._window, data_ranks(trainer).num_replicas
        seconds = window.computing + window.waiting + window.saving
        pl_module.log(metric_names.TOKENS_PER_SECOND, window.tokens * num_replicas / seconds)
        if window.pauses:
            waiting, computing = window.waiting / window.pauses, window.computing / window.batches
            pl_module.log(metric_names.DATA_WAIT_SHARE, waiting / (waiting + computing))
        pl_module.log(metric_names.BLOCKS_SAVED_SHARE, window.saved_shares / window.batches)
        pl_module.log(metric_names.BLOCKS_SKIPPED_SHARE, window.skipped_shares / window.batches)
        pl_module.log(metric_names.MEMORY_GIB, _peak_memory_gib(pl_module.device))
        if self.peak_flops is not None:
            per_device = window.flops * num_replicas / trainer.world_size / seconds
            pl_module.log(metric_names.MODEL_FLOPS_UTILISATION, per_device / self.peak_flops)


def _peak_memory_gib(device: torch.device) -> float:
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
    return peak / 2**30
