"""A progress bar that shows what a LayerSkip step does: loss, exits on, tokens a second."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from app import metric_names
from app.errors import check_range
from app.protocols import EarlyExitHost


class LayerSkipProgressBar(TQDMProgressBar):
    """Lightning's bar on stderr, with the exits that are on and the throughput; stdout is for results.

    Args:
        refresh_rate: Steps between redraws, 0 for no bar; by default 1 in a terminal and 50 in a log file.
    """

    def __init__(self, *, refresh_rate: int | None = None) -> None:
        check_range("refresh_rate", 0 if refresh_rate is None else refresh_rate, low=0)
        super().__init__(refresh_rate=(1 if sys.stderr.isatty() else 50) if refresh_rate is None else refresh_rate)

    def init_train_tqdm(self) -> Tqdm:
        """The bar of training."""
        with redirect_stdout(sys.stderr):
            return super().init_train_tqdm()

    def init_validation_tqdm(self) -> Tqdm:
        """The bar of a validation."""
        with redirect_stdout(sys.stderr):
            return super().init_validation_tqdm()

    def init_test_tqdm(self) -> Tqdm:
        """The bar of a test."""
        with redirect_stdout(sys.stderr):
            return super().init_test_tqdm()

    def init_predict_tqdm(self) -> Tqdm:
        """The bar of a prediction."""
        with redirect_stdout(sys.stderr):
            return super().init_predict_tqdm()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The logged prog_bar metrics without the version number, then exits on and tokens/s."""
        items: dict[str, Any] = dict(super().get_metrics(trainer, pl_module))
        items.pop("v_num", None)
        if isinstance(pl_module, EarlyExitHost):
            items["exits"] = ",".join(map(str, sorted(pl_module.exit_weights)))
        rate = trainer.callback_metrics.get(metric_names.TOKENS_PER_SECOND)
        if rate is not None:
            items["tok/s"] = f"{rate:.0f}"
        return items
