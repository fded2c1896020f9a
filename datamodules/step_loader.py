"""A training loader whose place in the data is a function of the optimizer step, and of nothing else.

Micro-batch `k` of rank `r` in a world of `W` takes rows `(k * W + r) * batch_size + [0, batch_size)` of the endless
stream, and optimizer step `t` begins at `k = t * accumulate_grad_batches`. So there is no position to save: Lightning
restores `trainer.global_step`, and the loader asks for it whenever an iteration begins.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from datamodules.data_workers import WorkerLoader

Batch = dict[str, Tensor]


class StepLoader(WorkerLoader):
    """A loader that asks for its position as late as possible, and that Lightning knows to be resumable.

    A schedule built on `trainer.estimated_stepping_batches` makes Lightning create the loader, and its iterator,
    before `global_step` is restored; worker processes would begin to fetch from step 0.
    An iterator of a `WorkerLoader` begins when the first batch is asked for.
    """

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the position follows from the step."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore; with `state_dict` it tells Lightning that stopping inside an epoch is fine."""
