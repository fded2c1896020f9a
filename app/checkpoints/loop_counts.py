"""Lightning's counts of micro-batches in a checkpoint, made those of a run between two optimizer steps.

A checkpoint may be written at any moment: while gradients accumulate, in a validation between two micro-batches, by any
callback, on an exception. Weights, optimizer states and schedules are then those of the latest optimizer step, and so
is the data's position; gradients are in no checkpoint. So the counts go back to that step, too, and a resumed run
repeats the step that was begun, from its first micro-batch.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

from app.errors import CheckpointError

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


def count_micro_batches(fit_loop: dict[str, Any], *, saved: int | None, given: int) -> None:
    """Let a checkpoint's counts be those of a run that accumulates `given` micro-batches a step instead of `saved`.

    Lightning takes a step when their number is a multiple of it: without this, a run that goes on on another number of
    devices with the same global batch would take its next step after the wrong number of micro-batches. Counts that
    are those of the run already stay as they are.

    Args:
        fit_loop: The state of Lightning's loop, as in a checkpoint; changed in place.
        saved: By the run that was saved; None where nobody tells but the counts.
        given: By the run that goes on.

    Raises:
        CheckpointError: It was saved within a step.
    """
    batches, steps = fit_loop[_BATCHES], fit_loop[_OPTIMIZATION]["optimizer"]["step"]
    if saved is None:
        saved = _micro_batches_of_step(batches, steps["current"]["completed"]) or given
    if saved == given or batches["total"]["ready"] == steps["total"]["completed"] * given:
        return
    for counts in (batches["total"], batches["current"]):
        ready = counts["ready"]
        if ready % saved:
            raise CheckpointError(
                f"trainer.accumulate_grad_batches: the checkpoint was saved within a step of {saved} micro-batches;"
                " resume it with that"
            )
        for kind in ("ready", "started", "processed", "completed"):  # the last may be one behind the others
            counts[kind] += ready // saved * given - ready


def _micro_batches_of_step(batches: dict[str, Any], steps: int) -> int:
    """As an epoch's counts tell it; 0 where they do not: before its first step, and at its end, whose step is cut."""
    ready: int = batches["current"]["ready"]
    return 0 if steps == 0 or batches["is_last_batch"] or ready % steps else ready // steps
