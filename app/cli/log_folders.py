"""Logs of a run that goes on stay one: in the folder that its last attempt wrote to, with what stood there before."""

from __future__ import annotations

import csv
import re
import warnings
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

_VERSION = re.compile(r"version_(\d+)")


def go_on_in_latest_version(trainer: Trainer) -> None:
    """Let loggers that would count up to a new, empty version take the latest one that has a `last.ckpt`.

    Args:
        trainer: Asked to go on from `last` or `auto`; nobody has asked it for its `log_dir` yet.
    """
    for logger in trainer.loggers:
        if not isinstance(logger, TensorBoardLogger | CSVLogger) or logger._version is not None:
            continue
        checkpoints = Path(logger.root_dir).glob("version_*/checkpoints/*last*.ckpt")
        found = (_VERSION.fullmatch(path.parents[1].name) for path in checkpoints)
        if versions := [int(version[1]) for version in found if version]:
            for other in trainer.loggers:  # the first one's folder is the run's
                if isinstance(other, TensorBoardLogger | CSVLogger) and other._version is None:
                    other._version = max(versions)
        return


def keep_metrics(trainer: Trainer) -> None:
    """Open CSV loggers so that they append to their `metrics.csv`, which they delete otherwise."""
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
