"""Lightning's counts of micro-batches in a checkpoint, changed to those of a run between two optimizer steps.

A checkpoint may be written at any moment: while gradients accumulate, in a validation between two micro-batches, by any
callback, on an exception. Its weights, optimizer states, schedules and data position are those of the latest optimizer
step, and it holds no gradients. So the counts go back to that step too, and a resumed run repeats the unfinished step
from its first micro-batch. Tested by tests/contract/test_resume.py, tests/integration/test_kill.py and
tests/unit/checkpoints/test_may_resume.py.
"""

from typing import Any

from lightning.pytorch import Trainer

from app.errors import CheckpointError

_BATCHES, _VALIDATION = "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"
_OPTIMIZATION = "epoch_loop.automatic_optimization.optim_progress"


def end_with_step(fit_loop: dict[str, Any], trainer: Trainer) -> None:
    """Change the state of Lightning's fit loop, as it is saved, so that it ends with the latest optimizer step.

    A validation that is not over is to begin anew. Lightning itself would resume with the next micro-batch, as if it
    had the gradients of those before. It would skip the validation that is due after the step of the checkpoint, and
    would leave out the first rows of one that was interrupted.
    """
    batches, validation = fit_loop[_BATCHES], fit_loop[_VALIDATION]
    steps = fit_loop[_OPTIMIZATION]["optimizer"]["step"]["current"]["completed"]  # of this epoch, as `current` is
    ready, seen = batches["current"]["ready"], validation["current"]
    if (begun := ready - steps * trainer.accumulate_grad_batches) > 0:
        for counts in (batches["total"], batches["current"]):
            counts.update(dict.fromkeys(counts, counts["ready"] - begun))
        batches["is_last_batch"] = False
        for counts in (validation["total"], seen):  # the validation after that step was over before the next one began
            counts.update(dict.fromkeys(counts, counts["completed"]))
        return
    is_over = validation["is_last_batch"] and seen["completed"] == seen["ready"]
    if batches["current"]["completed"] < ready or (trainer.validating and not is_over):
        for counts in (validation["total"], seen):  # what Lightning has at the first batch of a validation
            counts.update(dict.fromkeys(counts, counts["completed"] - seen["completed"]))
            counts["ready"] = counts["started"] = counts["completed"] + 1
        validation["is_last_batch"] = False


def count_micro_batches(fit_loop: dict[str, Any], *, saved: int | None, given: int) -> None:
    """Change the state of a saved fit loop to that of a run with `given` micro-batches a step instead of `saved`.

    Lightning takes a step when the number of micro-batches is a multiple of `accumulate_grad_batches`. A run that goes
    on with the same global batch on another number of devices would otherwise take its next step too early or too late.
    With `saved` None the counts of the epoch must tell. They do not before its first step, nor after its last one,
    which may have had fewer micro-batches. CheckpointError if the checkpoint was saved within a step.
    """
    batches, steps = fit_loop[_BATCHES], fit_loop[_OPTIMIZATION]["optimizer"]["step"]
    if saved is None:
        ready, taken = batches["current"]["ready"], steps["current"]["completed"]
        tells = taken and not batches["is_last_batch"] and ready % taken == 0
        saved = (ready // taken if tells else 0) or given
    if saved == given or batches["total"]["ready"] == steps["total"]["completed"] * given:
        return
    for counts in (batches["total"], batches["current"]):
        ready = counts["ready"]
        if ready % saved:
            raise CheckpointError(
                f"trainer.accumulate_grad_batches: the checkpoint was saved within a step of {saved} micro-batches;"
                " resume it with that"
            )
        for kind in ("ready", "started", "processed", "completed"):  # the last may be one less than the others
            counts[kind] += ready // saved * given - ready
