"""A plan as tables, and advice for a run that does not fit."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from app.planning.plan import RESERVE, Change, Machine, Plan
from app.tables import Table

_SIZES = (("GB", 1e9), ("MB", 1e6), ("KB", 1e3), ("bytes", 1))
_SPANS = (("hours", 3600), ("minutes", 60), ("seconds", 1))


def plan_tables(plan: Plan, machine: Machine) -> Iterator[Table]:
    """Make the tables of parameters, memory and work."""
    start = "drawn at random" if plan.recipe.from_scratch else "pretrained"
    yield Table(f"Parameters, {start}", ("part", "parameters"), list(_parameters(plan)))
    shared = f", {plan.layout.strategy} on {plan.recipe.world_size} devices" if plan.recipe.world_size > 1 else ""
    products = f", products in {plan.autocast}" if plan.autocast else ""
    title = f"Memory of a device, weights in {plan.dtype}{products}{shared}"
    columns = ["blocks kept\nfor the backward", "with activation\ncheckpointing"]
    columns[plan.checkpointing] += "\n= this run"
    if plan.exit_blocks is not None:  # they know no checkpointing
        columns = ["figure"]
    yield Table(title, ("part", *columns), [row[: 1 + len(columns)] for row in _memory(plan, machine)])
    yield Table("Work", ("what", "figure"), list(_work(plan, machine)))


def _parameters(plan: Plan) -> Iterator[tuple[str, str]]:
    parameters = plan.parameters
    yield "embeddings", f"{parameters.embeddings:,}"
    for size, blocks in groupby(parameters.blocks):
        yield f"{len(list(blocks))} blocks, each", f"{size:,}"
    yield "head", "tied to the embeddings" if parameters.tied else f"{parameters.head:,}"
    if plan.exit_blocks is not None:
        yield "exit blocks", f"{plan.exit_blocks.parameters:,}"
    yield "all", f"{parameters.total:,}"
    if parameters.trained < parameters.total:
        yield "of these trained", f"{parameters.trained:,}"


def _memory(plan: Plan, machine: Machine) -> Iterator[tuple[str, str, str]]:
    memory = plan.memory
    for name, size, checkpointed in (
        ("weights", memory.weights, memory.weights),
        ("gradients", memory.gradients, memory.gradients),
        ("optimizer states", memory.optimizer_states, memory.optimizer_states),
        ("gathered weights, gradients to send", memory.communication, memory.communication),
        ("activations", memory.activations, memory.activations_checkpointed),
        (f"{plan.autocast} copies of the blocks' weights", memory.weight_copies, memory.weight_copies),
        (
            "loss of the exits" if plan.exit_blocks is None else "loss, or pass of the model",
            memory.exit_loss,
            memory.exit_loss,
        ),
        ("or, after the loss: a block computed again", 0, memory.recomputed_block),
        ("or, after the backward: the optimizer's step", memory.optimizer_step, memory.optimizer_step),
        ("peak", memory.peak, memory.peak_checkpointed),
    ):
        if size or checkpointed:
            yield name, shown_bytes(size) if size else "-", shown_bytes(checkpointed)
    if machine.device_memory:
        room = f"{shown_bytes(machine.device_memory)}, of which {RESERVE:.0%} stay free"
        yield f"fits in {room}", "yes" if plan.fits else "NO", "yes" if plan.fits_checkpointed else "NO"


def shown_seconds(seconds: float) -> str:
    """Return a time in the largest unit of which there is at least one."""
    return _shown(seconds, _SPANS)


def shown_bytes(size: float) -> str:
    """Return the size in the largest unit of which there is at least one."""
    return _shown(size, _SIZES)


def _shown(value: float, units: Sequence[tuple[str, float]]) -> str:
    name, unit = next((entry for entry in units if value >= entry[1]), units[-1])
    number = value / unit
    return f"{number:,.0f} {name}" if number >= 999.5 or number == int(number) else f"{number:.3g} {name}"


def advice(changes: Sequence[Change]) -> str:
    """Advise on a run that does not fit its devices."""
    if not changes:
        return "It does not fit, nor with a smaller batch, checkpointing or FSDP2: take larger devices, or more of them"
    lines = [f"    {change.options}    ({shown_bytes(change.peak)})" for change in changes]
    return "\n".join(["It does not fit. It does with any one of these, given last (their peak in brackets):", *lines])


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
    again, share = (", with recomputation", 1 + plan.recomputation_cost) if plan.checkpointing else ("", 1.0)
    yield "FLOPs a step, mean", f"{plan.step_flops:.3e}"
    if again:
        yield f"FLOPs a step{again}", f"{share * plan.step_flops:.3e}"
    if plan.exit_blocks is None:
        yield "exits on: mean, most", f"{recipe.mean_exits:.2f}, {max(recipe.exits_by_step)}"
        yield "cost of the exits", f"+{plan.exits_cost:.1%}"
        yield "saved by layer dropout", f"-{plan.dropout_saving:.1%}"
        state = "which is on" if plan.checkpointing else "which is off (model.activation_checkpointing)"
        yield "cost of activation checkpointing", f"+{plan.recomputation_cost:.1%}, {state}"
    else:
        of_model = plan.exit_blocks.pass_flops / plan.step_flops
        yield "of these the frozen model's", f"{of_model:.0%}" if of_model else "none, since its states are cached"
    if plan.flops is not None:
        yield f"FLOPs in all{again}", f"{share * plan.flops:.3e}"
    if plan.seconds_per_step and machine.peak_flops:
        rate = f"{machine.utilisation:.0%} of {machine.peak_flops:.3g} FLOP/s a device"
        yield f"seconds a step{again}", f"{plan.seconds_per_step:,.3g} at {rate}"
    if plan.hours is not None:
        seconds = plan.hours * 3600
        yield "time, time x devices", f"{shown_seconds(seconds)}, {shown_seconds(seconds * recipe.world_size)}"
    if plan.exit_blocks is not None:
        yield "exit blocks in an export", shown_bytes(plan.exit_blocks.bytes)
    yield "a checkpoint, an export", f"{shown_bytes(plan.checkpoint_bytes)}, {shown_bytes(plan.export_bytes)}"
