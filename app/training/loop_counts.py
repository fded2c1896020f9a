"""Lightning's counts of micro-batches in a checkpoint, made those of a run between two optimizer steps.

A checkpoint may be written at any moment: while gradients accumulate, in a validation between two micro-batches, by any
callback, on an exception. Weights, optimizer states and schedules are then those of the latest optimizer step, and so
is the data's position; gradients are in no checkpoint. So the counts go back to that step, too, and a resumed run
repeats the step that was begun, from its first micro-batch.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

_BATCHES, _VALIDATION = "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"
_OPTIMIZATION = "epoch_loop.automatic_optimization.optim_progress"


def end_with_step(fit_loop: dict[str, Any], trainer: Trainer) -> None:
    """Let a checkpoint's counts end with the latest optimizer step, and a validation that is not over begin anew.

    Lightning itself would go on with the next micro-batch as if the gradients of those before were there. It would
    leave out the validation that follows the step that a checkpoint was written behind, and would show one that was
    interrupted the first rows alone.

    Args:
        fit_loop: The state of Lightning's loop, as in a checkpoint; changed in place.
        trainer: While it saves.
    """
    batches, validation = fit_loop[_BATCHES], fit_loop[_VALIDATION]
    steps = fit_loop[_OPTIMIZATION]["optimizer"]["step"]["current"]["completed"]  # of this epoch, as `current` is
    ready, seen = batches["current"]["ready"], validation["current"]
    if (begun := ready - steps * trainer.accumulate_grad_batches) > 0:
        for counts in (batches["total"], batches["current"]):
            counts.update(dict.fromkeys(counts, counts["ready"] - begun))
        batches["is_last_batch"] = False
        for counts in (validation["total"], seen):  # what stands behind that step was validated before the next began
            counts.update(dict.fromkeys(counts, counts["completed"]))
    elif batches["current"]["completed"] < ready or _interrupted(validation, trainer):
        for counts in (validation["total"], seen):  # as Lightning has them at a validation's first batch
            counts.update(dict.fromkeys(counts, counts["completed"] - seen["completed"]))
            counts["ready"] = counts["started"] = counts["completed"] + 1
        validation["is_last_batch"] = False


def _interrupted(validation: dict[str, Any], trainer: Trainer) -> bool:
    over = validation["is_last_batch"] and validation["current"]["completed"] == validation["current"]["ready"]
    return trainer.validating and not over
