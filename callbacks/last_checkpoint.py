"""Keep the checkpoint to resume from. Tested by tests/integration/test_resume.py and test_faults.py."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from app.checkpoints.integrity import KEEP_PREVIOUS
from app.errors import ConfigError, check_range


class LastCheckpoint(ModelCheckpoint):
    """Keep `last.ckpt`, written every so many steps and when training ends.

    Lightning's ModelCheckpoint leaves out the end of a run whose length is no multiple of its interval, and what
    the validation after the last step found.

    Args:
        every_n_train_steps: Optimizer steps between two checkpoints, >= 1.
        dirpath: Folder; `checkpoints` beside the logs by default.
        keep_previous: Keep the previous checkpoint, too, as `before_last.ckpt`. It takes as much disk again, and
            `--fall_back_to_previous true` resumes from it where the last one is damaged. In a script it needs
            `Trainer(plugins=[AtomicCheckpointIO()])` (app.checkpoints.checkpoint_io), which the command line gives.

    Raises:
        ConfigError: The interval is below 1, or `keep_previous` meets Lightning's own CheckpointIO, which keeps one.
    """

    def __init__(
        self, *, every_n_train_steps: int = 1000, dirpath: str | None = None, keep_previous: bool = False
    ) -> None:
        check_range("every_n_train_steps", every_n_train_steps, low=1)
        super().__init__(
            dirpath=dirpath,
            save_top_k=0,
            save_last=True,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
        )
        self._keep_previous = keep_previous

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self._keep_previous and type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            fix = "Trainer(plugins=[app.checkpoints.checkpoint_io.AtomicCheckpointIO()]) keeps it"
            raise ConfigError("keep_previous", got=True, allowed="false with Lightning's own CheckpointIO", fix=fix)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # A resumed run does not save what it was loaded from again: that would replace the previous checkpoint by it.
        self._last_global_step_saved = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tries = trainer.fast_dev_run  # type: ignore[attr-defined]  # Lightning sets it from another class
        if trainer.global_step > 0 and not tries:  # which is to leave nothing behind
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Save as ModelCheckpoint does, but with an option for the writer, which ModelCheckpoint cannot pass on."""
        if not self._keep_previous or self._last_global_step_saved == trainer.global_step:  # saved again at the end
            super()._save_checkpoint(trainer, filepath)
            return
        trainer.save_checkpoint(filepath, weights_only=False, storage_options={KEEP_PREVIOUS: True})
        self._last_global_step_saved, self._last_checkpoint_saved = trainer.global_step, filepath
