"""Keeps each point once in the logs of a resumed run: a killed run logged points behind its latest checkpoint.

Lightning logs step number n, counted from 1, and the validation after it at n - 1. Our callbacks draw figures and write
texts at n. A run that resumes at step n logs all points from n on again, and those of the validation after step n if it
was still due. Tested by tests/contract/test_resume.py.
"""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary

from app.whole_file import write_whole

EVENTS = "events.out.tfevents.*"  # names of the files that TensorBoard writes


def log_once(trainer: Trainer) -> None:
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
    for event, value in _values(Path(logger.log_dir)):
        if event.step == step - 1 or (event.step == step and not value.HasField("simple_value")):
            kept[value.tag, event.step] = event, value
    writer = logger.experiment.file_writer
    writer.add_event(Event(step=first_void, file_version="brain.Event:2"))
    writer.add_event(Event(step=first_void, session_log=SessionLog(status=SessionLog.START)))
    for event, value in kept.values():
        again = Event(step=event.step, wall_time=event.wall_time, summary=Summary(value=[value]))
        writer.event_writer.add_event(again)


def _values(folder: Path) -> Iterator[tuple[Any, Any]]:
    for file in sorted(folder.glob(EVENTS)):  # their names begin with the time they were opened
        yield from points(file)


def points(file: Path) -> Iterator[tuple[Any, Any]]:
    """The points in a file of TensorBoard's, each as the event and its value."""
    for event in LegacyEventFileLoader(str(file)).Load():
        for value in event.summary.value:
            yield event, value


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
