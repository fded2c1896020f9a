"""TensorBoard's points behind the checkpoint that a run goes on from: a killed run wrote them, and they come again."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.event_pb2 import Event, SessionLog


def forget_later_steps(trainer: Trainer) -> None:
    """Tell TensorBoard that a resumed run's points after its checkpoint are void, as SummaryWriter's purge_step does.

    That argument is of no use here: Lightning opens the writer before it reads the checkpoint. Points at the step of
    the checkpoint itself stay, since a validation that ended there is not run again.

    Args:
        trainer: Its checkpoint read, its first batch still to come.
    """
    if trainer.ckpt_path is None or not trainer.is_global_zero:
        return
    first_void = trainer.global_step + 1
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            file_writer = logger.experiment.file_writer
            file_writer.add_event(Event(step=first_void, file_version="brain.Event:2"))
            file_writer.add_event(Event(step=first_void, session_log=SessionLog(status=SessionLog.START)))
