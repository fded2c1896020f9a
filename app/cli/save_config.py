"""Saves what made a run: its config, in its folder and its checkpoints. Tested by tests/contract/test_resume.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from typing_extensions import override

from app.checkpoints.resumed_config import GivenConfig, changes_optimizer, take_optimizer_settings
from app.checkpoints.run_lock import hold_run
from app.checkpoints.run_record import RUN_CONFIG_KEY
from app.training.logged_steps import log_once
from app.training.module import LayerSkipModule
from app.whole_file import write_whole


class SaveFitConfig(SaveConfigCallback):
    """Saves the resolved config in the folder of a `fit`, and in each of its checkpoints.

    It waits until training starts, and ignores the other verbs: a `fit` that is refused, and `validate`, must not
    overwrite the config that made the run.
    """

    _goes_on = False  # whether the run was resumed and has not begun a batch since

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pass

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        hold_run(trainer)
        self._goes_on = trainer.ckpt_path is not None
        if self._goes_on:
            log_once(trainer)
        if trainer.ckpt_path and changes_optimizer(self.config["allow_changes"]):
            take_optimizer_settings(trainer)
        log_dir = trainer.log_dir  # asked on all ranks, since it is broadcast
        if trainer.is_global_zero:
            assert log_dir is not None
            Path(log_dir).mkdir(parents=True, exist_ok=True)
            write_whole(Path(log_dir, self.config_filename), _given_config(pl_module).text)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._goes_on = False

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A resumed run may begin with a validation that the killed run has logged. It then replaces what was logged.
        if self._goes_on:
            log_once(trainer)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[RUN_CONFIG_KEY] = _given_config(pl_module).text


def _given_config(pl_module: LightningModule) -> GivenConfig:
    assert isinstance(pl_module, LayerSkipModule)
    assert pl_module.given_config is not None
    return pl_module.given_config
