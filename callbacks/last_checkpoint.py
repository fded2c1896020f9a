"""The checkpoint to resume from: of the latest step that was worth it, and of the last."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class LastCheckpoint(ModelCheckpoint):
    """Keeps `last.ckpt`, written every so many steps and when training ends.

    Lightning's ModelCheckpoint leaves out the end of a run whose length is no multiple of its interval, and what
    the validation after the last step found.

    Args:
        every_n_train_steps: Optimizer steps between two checkpoints, >= 1.
        dirpath: Folder; `checkpoints` beside the logs by default.
    """

    def __init__(self, *, every_n_train_steps: int = 1000, dirpath: str | None = None) -> None:
        super().__init__(
            dirpath=dirpath,
            save_top_k=0,
            save_last=True,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save once more, if there was a step at all."""
        if trainer.global_step > 0:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
