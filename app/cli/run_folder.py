"""The folder of a run: the config that made it, and logs that a resumed run goes on with, each point in them once.

A killed run has logged points behind its latest checkpoint. Lightning logs step number n, counted from 1, and the
validation after it at n - 1. Our callbacks draw figures and write texts at n. A run that resumes at step n logs all
points from n on again, and those of the validation after step n if it was still due.
Tested by tests/contract/test_command_line.py and test_resume.py.
"""

import csv
import io
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from app.checkpoints.resumed_config import GivenConfig, changes_optimizer, take_optimizer_settings
from app.checkpoints.run_folders import hold_run
from app.checkpoints.run_record import RUN_CONFIG_KEY
from app.training.module import LayerSkipModule
from app.whole_file import write_whole
from callbacks.tensorboard import EVENT_FILES, points

_log = logging.getLogger(__name__)
_HPARAMS = "hparams.yaml"  # Lightning's loggers write it
_VERSION = re.compile(r"version_(\d+)")


class SaveFitConfig(SaveConfigCallback):
    """Saves the resolved config in the folder of a `fit`, and in each of its checkpoints.

    It waits until training starts, and ignores the other verbs: a `fit` that is refused, and `validate`, must not
    overwrite the config that made the run.
    """

    _goes_on = False  # whether the run was resumed and has not begun a batch since

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pass

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        hold_run(trainer)
        self._goes_on = trainer.ckpt_path is not None
        if self._goes_on:
            _log_once(trainer)
        if trainer.ckpt_path and changes_optimizer(self.config["allow_changes"]):
            take_optimizer_settings(trainer)
        log_dir = trainer.log_dir  # asked on all ranks, since it is broadcast
        if trainer.is_global_zero:
            assert log_dir is not None
            Path(log_dir).mkdir(parents=True, exist_ok=True)
            write_whole(Path(log_dir, self.config_filename), _given_config(pl_module).text)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._goes_on = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A resumed run may begin with a validation that the killed run has logged. It then replaces what was logged.
        if self._goes_on:
            _log_once(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[RUN_CONFIG_KEY] = _given_config(pl_module).text


def _given_config(pl_module: LightningModule) -> GivenConfig:
    assert isinstance(pl_module, LayerSkipModule)
    assert pl_module.given_config is not None
    return pl_module.given_config


def warn_of_shared_folder(trainer: Trainer) -> None:
    """Warn if the first logger, such as W&B's, gives a run no folder of its own."""
    first = trainer.loggers[0] if trainer.loggers else None
    if first is None or isinstance(first, TensorBoardLogger | CSVLogger) or not trainer.is_global_zero:
        return
    folder = Path(first.save_dir or trainer.default_root_dir)
    _log.warning(
        "trainer.logger: %s comes first, whose runs share the folder %s: a later run replaces its config.yaml, and"
        " --ckpt_path last and auto miss checkpoints that lie deeper. Put a TensorBoardLogger or CSVLogger before it",
        type(first).__name__,
        folder,
    )


def go_on_in_latest_version(trainer: Trainer) -> None:
    """Let loggers that would begin a new version take the latest one that has a `last.ckpt`.

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


@contextmanager
def no_trace_if_refused(trainer: Trainer) -> Iterator[None]:
    """Remove, where an error is raised, log files without a point and the folders that were made for them.

    Lightning opens the log files before it asks callbacks, datamodule and checkpoint whether the run can start.
    """
    opened = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger | CSVLogger)]
    folders = [Path(logger.log_dir) for logger in opened if trainer.is_global_zero]
    own = f"{EVENT_FILES}.{os.getpid()}.*"
    before = {file for folder in folders for file in folder.rglob(own)}
    made = [above for folder in folders for above in (folder, *folder.parents) if not above.exists()]
    try:
        yield
    except Exception:
        for folder in folders:
            for file in {*folder.rglob(own)} - before:
                if next(points(file), None) is None:
                    file.unlink()
                    if file.parent != folder:
                        with suppress(OSError):  # it holds an earlier evaluation
                            file.parent.rmdir()
            if folder in made and [path.name for path in folder.glob("*")] == [_HPARAMS]:
                (folder / _HPARAMS).unlink()
        for above in made:
            with suppress(OSError):  # it holds something
                above.rmdir()
        raise


def log_aside(trainer: Trainer, verb: str) -> None:
    """Let TensorBoard's loggers write below the run's folder where a fit has logged in it, as a run of its own there.

    TensorBoard takes points of an earlier step than those before them for a restart, and shows no later ones. The other
    files of an evaluation stay in the run's folder.
    """
    for logger in trainer.loggers if trainer.is_global_zero else ():
        if isinstance(logger, TensorBoardLogger) and any((folder := Path(logger.log_dir)).glob(EVENT_FILES)):
            logger._experiment = SummaryWriter(log_dir=str(folder / verb), **logger._kwargs)


def keep_metrics(trainer: Trainer) -> None:
    """Open CSV loggers so that they append to their `metrics.csv` instead of deleting it."""
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


def _log_once(trainer: Trainer) -> None:
    """Drop the points that a resumed run will log again, or has logged again.

    Called between the reading of the checkpoint and the first batch, before and after a validation that was due.
    """
    for logger in trainer.loggers if trainer.is_global_zero else ():
        if isinstance(logger, TensorBoardLogger):
            _purge(logger, trainer.global_step)
        elif isinstance(logger, CSVLogger):
            _drop_rows(Path(logger.log_dir) / "metrics.csv", trainer.global_step)


def _purge(logger: TensorBoardLogger, step: int) -> None:
    """Tell TensorBoard to forget everything from the latest logged step on, and write the points of that step again.

    SummaryWriter's `purge_step` cannot do this, since Lightning opens the writer before it reads the checkpoint.
    """
    first_void = max(0, step - 1)
    logger.experiment.flush()
    kept: dict[tuple[str, int], tuple[Event, Any]] = {}  # the later one of a point that was logged twice
    files = sorted(Path(logger.log_dir).glob(EVENT_FILES))  # their names begin with the time they were opened
    for event, value in chain.from_iterable(map(points, files)):
        if event.step == step - 1 or (event.step == step and not value.HasField("simple_value")):
            kept[value.tag, event.step] = event, value
    writer = logger.experiment.file_writer
    writer.add_event(Event(step=first_void, file_version="brain.Event:2"))
    writer.add_event(Event(step=first_void, session_log=SessionLog(status=SessionLog.START)))
    for event, value in kept.values():
        again = Event(step=event.step, wall_time=event.wall_time, summary=Summary(value=[value]))
        writer.event_writer.add_event(again)


def _drop_rows(file: Path, step: int) -> None:
    """Keep the rows of earlier steps; of those of the latest logged step, keep the last one with the same columns."""
    if not file.is_file():
        return
    with file.open(newline="") as lines:
        reader = csv.DictReader(lines)
        names, rows = reader.fieldnames or [], list(reader)
    kept: dict[object, dict[str, str]] = {}
    for number, row in enumerate(rows):
        if (logged := int(row["step"])) < step:
            kept[number if logged < step - 1 else tuple(name for name in names if row[name])] = row
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=names)
    writer.writeheader()
    writer.writerows(kept.values())
    write_whole(file, text.getvalue())
