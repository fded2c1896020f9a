"""Log what the sources of a mixture deliver: shares of tokens, epochs, skipped records, padding."""

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from app import metric_names
from app.protocols import StreamOwner

_log = logging.getLogger(__name__)


class DataMonitor(Callback):
    """Log, at every logging step, each source's share of tokens, epochs and skipped records so far, and padding.

    Shares, epochs and padding are of the rows that were trained on. `skipped_records` is ahead of them by up to
    `shuffle_megabytes` of text. Each rank counts its own rows since the run began, and the mean over ranks is logged.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        datamodule = trainer.datamodule  # type: ignore[attr-defined]  # set by the data connector
        if stage == "fit" and not isinstance(datamodule, StreamOwner):  # no error: datamodules share recipes
            _log.warning("DataMonitor has no effect: %s does not mix sources", type(datamodule).__name__)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        steps = trainer.log_every_n_steps  # type: ignore[attr-defined]  # 0 turns logging off
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        is_logged = steps and (batch_idx + 1) % (steps * trainer.accumulate_grad_batches) == 0
        if not is_logged or not isinstance(datamodule, StreamOwner):
            return
        statistics = datamodule.source_statistics()
        tokens = sum(source.tokens for source in statistics.values())
        rows = sum(source.rows for source in statistics.values())
        metrics = {metric_names.DATA_PADDING_SHARE: 1 - tokens / (rows * datamodule.seq_len)}
        for name, source in statistics.items():
            metrics[metric_names.data_source("token_share", name)] = source.tokens / tokens
            metrics[metric_names.data_source("epochs", name)] = source.epochs
            metrics[metric_names.data_source("skipped_records", name)] = float(source.skipped)
        pl_module.log_dict(metrics, sync_dist=True)
