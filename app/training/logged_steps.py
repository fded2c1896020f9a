"""Logs of a run that goes on hold every point once: a killed run logged what its latest checkpoint does not know of.

Lightning logs the step that is number n, counted from 1, at n - 1, and so the validation behind it. Our callbacks draw
figures and write texts at n. A run that goes on from step n logs all points from n on anew, and those of the validation
behind step n if that was still due.
"""

from __future__ import annotations

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


def log_once(trainer: Trainer) -> None:
    """Drop points of a resumed run's logs that it logs again, or has logged again.

    Args:
        trainer: Its checkpoint read and its first batch still to come, before and after a validation that was due.
    """
    for logger in trainer.loggers if trainer.is_global_zero else ():
        if isinstance(logger, TensorBoardLogger):
            _purge(logger, trainer.global_step)
        elif isinstance(logger, CSVLogger):
            _drop_rows(Path(logger.log_dir) / "metrics.csv", trainer.global_step)


def _purge(logger: TensorBoardLogger, step: int) -> None:
    """Tell TensorBoard to forget all from the latest logged step on, and write that step's points again.

    SummaryWriter's `purge_step` is of no use: Lightning opens the writer before it reads the checkpoint.
    """
    first_void = max(0, step - 1)
    logger.experiment.flush()
    kept: dict[tuple[str, int], tuple[Event, Any]] = {}  # of a point that was logged twice, the later one
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
    for file in sorted(folder.glob("events.out.tfevents.*")):  # by the time at which they were opened
        for event in LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                yield event, value


def _drop_rows(file: Path, step: int) -> None:
    """Keep rows of earlier steps, and of those of the latest logged one the last with the same columns."""
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
