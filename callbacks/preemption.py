"""End a run that is told to stop, so that it can go on. Tested by tests/integration/test_preemption.py."""

import logging
import os
import signal
import subprocess
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import Optimizer

from app.checkpoints.sharded import ShardedCheckpoints
from app.startup_signals import take_startup_signal

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# One event may reach a process twice: from its sender, and passed on by torchrun or srun.
_ONE_EVENT_SECONDS = 3.0

_log = logging.getLogger(__name__)


class Preemption(Callback):
    """On SIGTERM or SIGUSR1 at any rank, all ranks finish their step, save `last.ckpt` and exit with status 0.

    Ranks agree by one more integer where they sum the losses of a step anyway, so nothing waits longer. A validation
    is finished first. A second signal, more than three seconds later, ends the process at once. SIGUSR1 that comes
    before training begins (under `layerskip fit`) ends the run there; SIGTERM then ends the process as usual.

    SIGUSR1, which SLURM sends before a job's time is up (`--signal`), queues the job again. SIGTERM does not: SLURM
    itself queues a job that it preempts (`--requeue`), and a job that its user cancels is not to come back.

    Args:
        requeue: Whether SIGUSR1 queues a SLURM job again.
    """

    def __init__(self, *, requeue: bool = True) -> None:
        self._requeue = requeue
        self._received: int | None = None
        self._received_at = 0.0
        self._stop_by: int | None = None  # the signal that all ranks have agreed on

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen(trainer)

    def _listen(self, trainer: Trainer) -> None:
        """Replace Lightning's handlers, which communicate from inside a signal. Lightning restores the earlier ones."""
        if trainer.training or trainer.sanity_checking:
            for signum in _SIGNALS:
                signal.signal(signum, self._note)
            if (earlier := take_startup_signal()) is not None:
                self._note(earlier, None)
            self._agree(trainer)
            if self._stop_by is not None:
                self._exit(trainer, "nothing to save yet", requeue=True)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._received is None:
            self._received, self._received_at = signum, time.monotonic()
        elif time.monotonic() - self._received_at > _ONE_EVENT_SECONDS:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop after a validation in which a signal came; only here has ModelCheckpoint written `best.ckpt`."""
        if self._stop_by is not None:
            self._save_and_exit(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._agree(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._stop_by is not None:
            trainer._logger_connector.update_train_step_metrics()  # Lightning logs the step only after this hook
            self._save_and_exit(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:  # to stop, no further step is needed
            self._agree(trainer)

    def _agree(self, trainer: Trainer) -> None:
        received = torch.tensor(int(self._received or 0), device=trainer.strategy.root_device)
        self._stop_by = int(trainer.strategy.reduce(received, reduce_op="max")) or None

    def _save_and_exit(self, trainer: Trainer) -> None:
        saved = _save_last(trainer)
        if isinstance(trainer.strategy, ShardedCheckpoints):
            trainer.strategy.finish_saving()
        resume = f"{saved} is whole: go on with --ckpt_path last (or auto)" if saved else "nothing was saved"
        self._exit(trainer, resume, requeue=saved is not None)

    def _exit(self, trainer: Trainer, resume: str, *, requeue: bool) -> None:
        assert self._stop_by is not None
        if trainer.is_global_zero:
            name = signal.Signals(self._stop_by).name
            _log.warning("%s: stopped after step %d; %s", name, trainer.global_step, resume)
            if requeue and self._requeue and self._stop_by == signal.SIGUSR1 and "SLURM_JOB_ID" in os.environ:
                _requeue_job()
        raise SystemExit(0)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero:
            resume = "go on from the last checkpoint, if there is one, with --ckpt_path auto"
            _log.warning("interrupted after step %d; %s", trainer.global_step, resume)


def _save_last(trainer: Trainer) -> str | None:
    """Save the run's `last.ckpt`; return its path, or None for a run without checkpoints."""
    savers = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
    if not savers:
        return None
    saver = next((saver for saver in savers if saver.save_last), savers[0])
    if saver.save_last:
        saver._save_last_checkpoint(trainer, saver._monitor_candidates(trainer))
        return saver.last_model_path
    path = str(Path(saver.dirpath or ".") / "last.ckpt")
    trainer.save_checkpoint(path, weights_only=False)
    return path


def _requeue_job() -> None:
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)  # noqa: S603, S607
    except OSError as error:
        _log.error("cannot queue SLURM job %s again: %s", job, error)
        return
    if done.returncode:
        _log.error("cannot queue SLURM job %s again: %s", job, done.stderr.strip() or f"status {done.returncode}")
    else:
        _log.warning("queued SLURM job %s again", job)
