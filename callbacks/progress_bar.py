"""A progress bar that shows what a LayerSkip step does: loss, exits on, tokens a second."""

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import wraps
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from app import metric_names
from app.errors import check_range
from app.protocols import EarlyExitHost


def _on_stderr(make: Callable[[Any], Tqdm]) -> Callable[[Any], Tqdm]:
    """Draw the bar that `make` makes on stderr; Lightning draws on stdout."""

    @wraps(make)
    def made(bar: Any) -> Tqdm:
        with redirect_stdout(sys.stderr):
            return make(bar)

    return made


class LayerSkipProgressBar(TQDMProgressBar):
    """Lightning's bar on stderr, with the exits that are on and the throughput; stdout is for results.

    Args:
        refresh_rate: Steps between redraws, 0 for no bar; by default 1 in a terminal and 50 in a log file.
    """

    def __init__(self, *, refresh_rate: int | None = None) -> None:
        check_range("refresh_rate", 0 if refresh_rate is None else refresh_rate, low=0)
        super().__init__(refresh_rate=(1 if sys.stderr.isatty() else 50) if refresh_rate is None else refresh_rate)

    init_sanity_tqdm = _on_stderr(TQDMProgressBar.init_sanity_tqdm)
    init_train_tqdm = _on_stderr(TQDMProgressBar.init_train_tqdm)
    init_validation_tqdm = _on_stderr(TQDMProgressBar.init_validation_tqdm)
    init_test_tqdm = _on_stderr(TQDMProgressBar.init_test_tqdm)
    init_predict_tqdm = _on_stderr(TQDMProgressBar.init_predict_tqdm)

    @property
    def total_train_batches(self) -> int | float:
        """Micro-batches of this epoch when it ends, with those before a resume. Lightning counts remaining steps."""
        trainer = self.trainer
        epoch: int | float = trainer.num_training_batches
        if trainer.max_steps < 1:
            return epoch
        accumulate: int = trainer.accumulate_grad_batches
        steps = self._taken // accumulate + trainer.max_steps - trainer.global_step
        return min(epoch, steps * accumulate)

    @property
    def _taken(self) -> int:
        """Micro-batches of this epoch so far."""
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
        taken: int = progress.processed  # type: ignore[attr-defined]  # the base class lacks it
        return taken if taken < self.trainer.num_training_batches else 0  # an epoch starts with the last one's count

    def on_train_start(self, trainer: Trainer, *rest: Any) -> None:
        super().on_train_start(trainer, *rest)
        # Lightning does not start an epoch that is resumed in its midst, and so would show no bar for it.
        if trainer.fit_loop.restarted_mid_epoch or trainer.fit_loop.restarted_on_epoch_end:
            self.on_train_epoch_start(trainer)

    def on_exception(self, *_: Any) -> None:
        """End the line of every bar, so that the error stands on the next one."""
        bars = (self._train_progress_bar, self._val_progress_bar, self._test_progress_bar, self._predict_progress_bar)
        for bar in bars:
            if bar is not None:
                bar.close()

    def on_train_epoch_start(self, trainer: Trainer, *rest: Any) -> None:
        super().on_train_epoch_start(trainer, *rest)
        if taken := self._taken:  # before a resume: it counts as done, and took no time of this process
            self.train_progress_bar.n = self.train_progress_bar.initial = taken
            self.train_progress_bar.refresh()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        items: dict[str, Any] = dict(super().get_metrics(trainer, pl_module))
        items.pop("v_num", None)
        if isinstance(pl_module, EarlyExitHost):
            items["exits"] = ",".join(map(str, sorted(pl_module.exit_weights)))
        rate = trainer.callback_metrics.get(metric_names.TOKENS_PER_SECOND)
        if rate is not None:
            items["tok/s"] = f"{rate:.0f}"
        return items
