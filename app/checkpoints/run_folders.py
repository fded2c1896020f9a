"""The folders that a run writes checkpoints to, which it holds. Tested by tests/unit/checkpoints/test_run_lock.py."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from app.checkpoints.run_lock import hold


def checkpoint_folders(trainer: Trainer) -> list[Path]:
    """The folders on a disk that the callbacks of a run write checkpoints to."""
    beside_logs = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
    savers: list[Any] = trainer.checkpoint_callbacks
    folders = {str(getattr(saver, "dirpath", None) or beside_logs) for saver in savers}
    return [Path(folder) for folder in sorted(folders) if "://" not in folder]


def hold_run(trainer: Trainer) -> None:
    """Hold every folder that a run writes checkpoints to, all ranks together. Raises CheckpointError as `hold`."""
    folders = checkpoint_folders(trainer)  # computed on all ranks, since the logger broadcasts its folder
    for folder in folders if trainer.is_global_zero else ():
        hold(folder)
