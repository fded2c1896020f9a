"""A plan as tables."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from app.evaluation.training_plan import RESERVE, Machine, Plan
from app.protocols import Table

_LARGE = 2e9  # bytes, to be shown as GB


def plan_tables(plan: Plan, machine: Machine) -> Iterator[Table]:
    """Parameters, memory, and work."""
    yield Table("Parameters", ("part", "parameters"), list(_parameters(plan)))
    shared = f", {plan.layout.strategy} on {plan.recipe.world_size} devices" if plan.recipe.world_size > 1 else ""
    products = f", products in {plan.autocast}" if plan.autocast else ""
    title = f"Memory of a device, weights in {plan.dtype}{products}{shared}"
    unit = _unit(plan)[1]
    yield Table(title, ("part", unit, f"{unit} with activation\ncheckpointing"), list(_memory(plan, machine)))
    yield Table("Work", ("what", "figure"), list(_work(plan, machine)))


def _parameters(plan: Plan) -> Iterator[tuple[str, str]]:
    parameters = plan.parameters
    yield "embeddings", f"{parameters.embeddings:,}"
    for size, blocks in groupby(parameters.blocks):
        yield f"{len(list(blocks))} blocks, each", f"{size:,}"
    yield "head", "tied to the embeddings" if parameters.tied else f"{parameters.head:,}"
    yield "all", f"{parameters.total:,}"


def _memory(plan: Plan, machine: Machine) -> Iterator[tuple[str, str, str]]:
    memory, unit = plan.memory, _unit(plan)[0]
    for name, size, checkpointed in (
        ("weights", memory.weights, memory.weights),
        ("gradients", memory.gradients, memory.gradients),
        ("optimizer states", memory.optimizer_states, memory.optimizer_states),
        ("gathered weights, gradients to send", memory.communication, memory.communication),
        ("activations", memory.activations, memory.activations_checkpointed),
        (f"{plan.autocast} copies of the blocks' weights", memory.weight_copies, memory.weight_copies),
        ("loss of the exits", memory.exit_loss, memory.exit_loss),
        ("or, after the loss: a block computed again", 0, memory.recomputed_block),
        ("or, after the backward: the optimizer's step", memory.optimizer_step, memory.optimizer_step),
        ("peak", memory.peak, memory.peak_checkpointed),
    ):
        if size or checkpointed:
            yield name, f"{size / unit:,.2f}" if size else "-", f"{checkpointed / unit:,.2f}"
    if machine.device_memory:
        room = f"{machine.device_memory / unit:,.1f}, of which {RESERVE:.0%} stay free"
        yield f"fits in {room}", "yes" if plan.fits else "NO", "yes" if plan.fits_checkpointed else "NO"


def _unit(plan: Plan) -> tuple[float, str]:
    return (1e9, "GB") if plan.memory.peak >= _LARGE else (1e6, "MB")


def _work(plan: Plan, machine: Machine) -> Iterator[tuple[str, str]]:
    recipe = plan.recipe
    micro_batch = f"{recipe.batch_size} rows x {recipe.seq_len:,} tokens"
    yield (
        "tokens a step, rows being full",
        f"{recipe.tokens_per_step:,} = {recipe.world_size} devices x {recipe.accumulate} x {micro_batch}",
    )
    if recipe.max_steps is None:
        yield "steps, tokens", "no fixed number (trainer.max_steps)"
    else:
        yield "steps, tokens", f"{recipe.max_steps:,}, {recipe.tokens:,}"
    yield "FLOPs a step, mean", f"{plan.step_flops:.3e}"
    yield "exits on: mean, most", f"{recipe.mean_exits:.2f}, {max(recipe.exits_by_step)}"
    yield "cost of the exits", f"+{plan.exits_cost:.1%}"
    yield "saved by layer dropout", f"-{plan.dropout_saving:.1%}"
    state = "which is on" if plan.checkpointing else "which is off (model.activation_checkpointing)"
    yield "cost of activation checkpointing", f"+{plan.recomputation_cost:.1%}, {state}"
    if plan.flops is not None:
        yield "FLOPs in all", f"{plan.flops:.3e}"
    if plan.seconds_per_step and machine.peak_flops:
        rate = f"{machine.peak_flops:.3g} FLOP/s a device, {machine.utilisation:.0%} of it used"
        yield f"seconds a step at {rate}", f"{plan.seconds_per_step:,.3g}"
    if plan.hours is not None:
        yield "hours, device-hours", f"{plan.hours:,.1f}, {plan.hours * recipe.world_size:,.0f}"
    unit, name = _unit(plan)
    yield (
        "a checkpoint, an export",
        f"{plan.checkpoint_bytes / unit:,.2f} {name}, {plan.export_bytes / unit:,.2f} {name}",
    )
