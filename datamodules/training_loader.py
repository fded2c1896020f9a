"""A training loader whose place in the data its datamodule knows, and nobody else."""

from __future__ import annotations

from typing import Any

from datamodules.data_workers import WorkerLoader


class TrainingLoader(WorkerLoader):
    """A loader that begins where its datamodule stands, and that Lightning knows to be resumable.

    A schedule built on `trainer.estimated_stepping_batches` makes Lightning create the loader, and its iterator, before
    a checkpoint is restored; worker processes would begin to fetch from the first row. An iterator of a `WorkerLoader`
    begins when the first batch is asked for.
    """

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the datamodule keeps the position, or the step tells it."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore; with `state_dict` it tells Lightning that stopping inside an epoch is fine."""
