"""Lets a resumed run log into the folder of its last attempt, and keep the log that is there.

Tested by tests/contract/test_command_line.py.
"""

from __future__ import annotations

import csv
import re
import warnings
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

_VERSION = re.compile(r"version_(\d+)")


def go_on_in_latest_version(trainer: Trainer) -> None:
    """Lets loggers that would begin a new version of their folder take the latest version that has a `last.ckpt`.

    This must come before the trainer is asked for its `log_dir`.
    """
    for logger in trainer.loggers:
        if not isinstance(logger, TensorBoardLogger | CSVLogger) or logger._version is not None:
            continue
        checkpoints = Path(logger.root_dir).glob("version_*/checkpoints/*last*.ckpt")
        found = (_VERSION.fullmatch(path.parents[1].name) for path in checkpoints)
        if versions := [int(version[1]) for version in found if version]:
            for other in trainer.loggers:  # the run's folder is that of the first logger
                if isinstance(other, TensorBoardLogger | CSVLogger) and other._version is None:
                    other._version = max(versions)
        return


def keep_metrics(trainer: Trainer) -> None:
    """Opens CSV loggers so that they append to their `metrics.csv` instead of deleting it."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        if not isinstance(logger, CSVLogger) or not (folder := Path(logger.log_dir)).is_dir():
            continue
        file, aside = folder / "metrics.csv", folder / "metrics.csv.kept"
        if file.is_file():
            file.replace(aside)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Experiment logs directory .* will be deleted")
                writer = logger.experiment
        finally:
            if aside.is_file():
                aside.replace(file)
        if file.is_file():
            with file.open(newline="") as lines:
                writer.metrics_keys = next(csv.reader(lines), [])
