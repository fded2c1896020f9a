"""What to change in a run that does not fit its devices, as far as the plan's own numbers tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from app.planning.memory import Layout
from app.planning.plan import Plan
from app.planning.recipe import Recipe

Replan = Callable[[Recipe, Layout], Plan]


class Change(NamedTuple):
    """Something with which a run fits.

    Attributes:
        options: Of the command line, given last.
        peak: Bytes on one device then.
    """

    options: str
    peak: int


def fits(plan: Plan, *, checkpointing: bool) -> bool | None:
    """Whether it does, or None where the device is not known."""
    return plan.fits_checkpointed if checkpointing else plan.fits


def changes_that_fit(plan: Plan, replan: Replan) -> list[Change]:
    """Each way that there is, with the largest micro-batch that it allows; the batch of a step stays what it was."""
    ways = [("", plan.layout, plan.checkpointing)]
    if not plan.checkpointing:
        ways.append(("--model.activation_checkpointing true", plan.layout, True))
    if plan.recipe.world_size > 1 and plan.layout.strategy != "fsdp2":
        sharded = Layout(strategy="fsdp2", shards=plan.recipe.world_size, gathers_cast=True)
        ways.append(("--config configs/trainer/fsdp2.yaml", sharded, True))
    replan, found = cache(replan), []
    for options, layout, checkpointing in ways:
        recipe, tried = plan.recipe, plan if layout == plan.layout else replan(plan.recipe, layout)
        while not fits(tried, checkpointing=checkpointing) and recipe.batch_size % 2 == 0:
            recipe = replace(recipe, batch_size=recipe.batch_size // 2, accumulate=recipe.accumulate * 2)
            tried = replan(recipe, layout)
        if fits(tried, checkpointing=checkpointing):
            smaller = f"--data.batch_size {recipe.batch_size} --trainer.accumulate_grad_batches {recipe.accumulate}"
            said = [options] * bool(options) + [smaller] * (recipe != plan.recipe)
            found.append(Change(" ".join(said), tried.memory.peak_checkpointed if checkpointing else tried.memory.peak))
    return found
