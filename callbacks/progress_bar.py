"""A progress bar that shows what a LayerSkip step does: loss, exits on, tokens a second."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from app import metric_names
from app.protocols import EarlyExitHost


class LayerSkipProgressBar(TQDMProgressBar):
    """Lightning's bar, with the exits that are on and the throughput."""

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
