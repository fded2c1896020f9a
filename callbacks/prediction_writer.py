"""Write each row's loss at every exit, for `layerskip predict`. Tested by tests/integration/test_monitors.py."""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from app.data_ranks import data_ranks

_log = logging.getLogger(__name__)


class PredictionWriter(BasePredictionWriter):
    """Append predictions to `filename` in the run's folder while they are made, one file for each rank.

    A loss that is not finite is null, since JSON has no number for it.

    Args:
        filename: Name of the file; ranks above 0 add their number. Of ranks that share their rows (tensor parallelism)
            only the first writes.
    """

    def __init__(self, *, filename: str = "predictions.jsonl") -> None:
        super().__init__(write_interval="batch")
        self.filename = filename

    def _path(self, trainer: Trainer) -> Path:
        name = Path(self.filename)
        if trainer.global_rank:
            name = name.with_stem(f"{name.stem}-rank{trainer.global_rank}")
        return Path(trainer.log_dir or trainer.default_root_dir) / name

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ranks_of_a_row = trainer.world_size // data_ranks(trainer).num_replicas  # they are neighbours
        self._writes = trainer.global_rank % ranks_of_a_row == 0
        if not self._writes:
            return
        path = self._path(trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        _log.info("writing predictions to %s", path)

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        if not self._writes:
            return
        losses = {layer: values.tolist() for layer, values in sorted(prediction["loss_by_exit"].items())}
        with self._path(trainer).open("a") as file:
            for idx, source in enumerate(prediction["source"].tolist()):
                row = {layer: round(values[idx], 6) for layer, values in losses.items()}
                by_exit = {layer: loss if math.isfinite(loss) else None for layer, loss in row.items()}
                record = {"batch": batch_idx, "row": idx, "source": source, "loss_by_exit": by_exit}
                file.write(json.dumps(record) + "\n")
