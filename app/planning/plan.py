"""What a training run will take: parameters, memory, tokens, FLOPs, hours; and what to change if it does not fit."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple, Self

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedConfig, PreTrainedModel

from app.model.lora import LoraSettings, adapters_of
from app.planning.memory import Layout, Memory, ask_optimizer, plan_memory
from app.planning.recipe import Departure, Recipe, find_departures
from app.planning.step import Micro, MicroBatchCosts, build_fake, measure_micro_batch
from app.words import dtype_name

RESERVE = 0.1  # share of a device for its context, the network's buffers, and gaps between tensors


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """How many there are. A tied head has none of its own."""

    total: int
    trained: int
    embeddings: int
    head: int
    blocks: tuple[int, ...]
    tied: bool


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A device of the run; None where a figure is unknown."""

    device_memory: float | None = None  # bytes
    peak_flops: float | None = None  # FLOPs a second that the device can do at most in the precision of the run
    utilisation: float = 0.4  # share of `peak_flops` that a run reaches, in (0, 1]

    def has_room_for(self, peak: int) -> bool | None:
        """Tell whether `peak` bytes leave RESERVE of the device free; None where the device is unknown."""
        return None if self.device_memory is None else peak <= self.device_memory * (1 - RESERVE)

    def seconds(self, flops: float, *, world_size: int = 1) -> float | None:
        """Tell how long `world_size` such devices take for `flops`; None where the device is unknown."""
        return self.peak_flops and flops / (self.peak_flops * self.utilisation * world_size)


@dataclass(frozen=True, kw_only=True)
class ExitBlockPlan:
    """What a run has that trains exit blocks and leaves the model as it is."""

    parameters: int
    bytes: int
    pass_flops: float  # FLOPs of a step that are the frozen model's; 0 if its states are cached
    pass_flops_per_token: float  # FLOPs of the frozen model without its head, which caching a token takes


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The parameters, memory, FLOPs and time that a run takes."""

    recipe: Recipe  # what was asked, completed by the optimizer's learning rate
    layout: Layout
    dtype: str  # dtype of the weights
    autocast: str | None  # dtype of the products, where it is another
    parameters: Parameters
    memory: Memory  # bytes on one device
    fits: bool | None  # see Machine.has_room_for
    fits_checkpointed: bool | None = None  # `fits` with activation checkpointing
    step_flops: float  # FLOPs of the mean step on all devices, without recomputation
    dropout_saving: float = 0.0  # share of the FLOPs of a step with its exits that layer dropout saves
    exits_cost: float = 0.0  # FLOPs of the early exits over those of a step with neither exits nor dropout
    # FLOPs of activation checkpointing over the same; they count for the time if it is on.
    recomputation_cost: float = 0.0
    checkpointing: bool = False
    checkpoint_bytes: int  # weights and optimizer states
    export_bytes: int  # weights alone, into which adapters are merged
    seconds_per_step: float | None  # at the machine's utilisation
    exit_blocks: ExitBlockPlan | None = None  # of a frozen model, whose recipe has neither exits nor dropout

    @property
    def flops(self) -> float | None:
        """FLOPs of the whole run, without recomputation."""
        return None if self.recipe.max_steps is None else self.step_flops * self.recipe.max_steps

    @property
    def hours(self) -> float | None:
        if self.recipe.max_steps is None or self.seconds_per_step is None:
            return None
        return self.recipe.max_steps * self.seconds_per_step / 3600

    @property
    def departures(self) -> list[Departure]:
        return find_departures(self.recipe)

    def fits_with(self, *, checkpointing: bool) -> bool | None:
        """Tell whether the run fits its devices; None where these are unknown."""
        return self.fits_checkpointed if checkpointing else self.fits


class Change(NamedTuple):
    """Options of the command line, given last, with which a run fits, and the peak in bytes on one device then."""

    options: str
    peak: int


class _MicroBatchFlops(NamedTuple):
    """FLOPs of a micro-batch on one device, by what is counted."""

    plain: float  # neither exits nor dropout
    undropped: float  # the recipe's exits without its dropout
    mean: float  # both
    recomputed: float  # what activation checkpointing computes again

    @classmethod
    def of(cls, recipe: Recipe, costs: MicroBatchCosts, *, frozen: bool) -> Self:
        whole = [1.0] * recipe.num_layers
        passes = 2 if frozen else 3  # of the cost of a forward, in forward and backward; frozen weights save one
        return cls(
            plain=costs.flops(num_exits=1, kept_shares=whole),
            undropped=costs.flops(num_exits=recipe.mean_exits, kept_shares=whole),
            mean=costs.flops(num_exits=recipe.mean_exits, kept_shares=[1 - rate for rate in recipe.mean_dropout_rates]),
            recomputed=sum(costs.block_flops) / passes,
        )


def plan_training(
    config: PreTrainedConfig,
    recipe: Recipe,
    configure: Callable[[nn.Module], Optimizer],
    *,
    layout: Layout,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    checkpointing: bool,
    machine: Machine,
    lora: LoraSettings | None = None,
) -> Plan:
    """Find out what a run takes, without weights, data or accelerator.

    `configure` makes the run's optimizer for a module; the recipe's learning rate and `small_weights` are read off it.
    `dtype` is that of the weights, and `autocast` that of the products, where it is another. With `lora` the model is
    frozen and its adapters are trained. ConfigError if it cannot be built or exit early, or shapes depend on values.
    """
    model, mode = build_fake(config, dtype=dtype, lora=lora)
    optimizer = ask_optimizer(configure, [each for each in model.parameters() if each.requires_grad])
    recipe = optimizer.completed(recipe, dtype)
    gathered = autocast if layout.gathers_cast else None
    running, mode = (model, mode) if gathered is None else build_fake(config, dtype=gathered, lora=lora)
    micro = Micro(
        batch_size=recipe.batch_size,
        seq_len=recipe.seq_len,
        num_exits=max(recipe.exits_by_step),
        dtype=gathered or dtype,
        autocast=None if gathered else autocast,
    )
    costs = measure_micro_batch(running, mode, micro)
    memory = plan_memory(model, costs, optimizer, layout, gathered=gathered)
    whole = plan_memory(model, costs, optimizer, Layout())
    flops = _MicroBatchFlops.of(recipe, costs, frozen=lora is not None)
    step_flops = flops.mean * recipe.accumulate * recipe.world_size
    return Plan(
        recipe=recipe,
        layout=layout,
        dtype=dtype_name(dtype),
        autocast=None if autocast is None else dtype_name(autocast),
        parameters=count_parameters(model),
        memory=memory,
        fits=machine.has_room_for(memory.peak),
        fits_checkpointed=machine.has_room_for(memory.peak_checkpointed),
        step_flops=step_flops,
        dropout_saving=1 - flops.mean / flops.undropped,
        exits_cost=flops.undropped / flops.plain - 1,
        recomputation_cost=flops.recomputed / flops.plain,
        checkpointing=checkpointing,
        checkpoint_bytes=whole.weights + whole.optimizer_states,
        export_bytes=whole.weights
        - sum(adapter.nbytes for adapter in adapters_of(dict(model.named_parameters())).values()),
        seconds_per_step=machine.seconds(
            step_flops * (1 + checkpointing * flops.recomputed / flops.plain), world_size=recipe.world_size
        ),
    )


def changes_that_fit(plan: Plan, replan: Callable[[Recipe, Layout], Plan]) -> list[Change]:
    """Find each way to make the run fit, with the largest micro-batch that it allows; the batch of a step stays."""
    ways = [("", plan.layout, plan.checkpointing)]
    if not plan.checkpointing and plan.exit_blocks is None:
        ways.append(("--model.activation_checkpointing true", plan.layout, True))
    shardable = plan.parameters.trained == plan.parameters.total  # adapters are not
    if plan.recipe.world_size > 1 and plan.layout.strategy != "fsdp2" and shardable:
        sharded = Layout(strategy="fsdp2", shards=plan.recipe.world_size, gathers_cast=True)
        ways.append(("--config configs/trainer/fsdp2.yaml", sharded, True))
    replan, found = cache(replan), []
    for options, layout, checkpointing in ways:
        recipe, tried = plan.recipe, plan if layout == plan.layout else replan(plan.recipe, layout)
        while not tried.fits_with(checkpointing=checkpointing) and recipe.batch_size % 2 == 0:
            recipe = replace(recipe, batch_size=recipe.batch_size // 2, accumulate=recipe.accumulate * 2)
            tried = replan(recipe, layout)
        if tried.fits_with(checkpointing=checkpointing):
            smaller = f"--data.batch_size {recipe.batch_size} --trainer.accumulate_grad_batches {recipe.accumulate}"
            said = [options] * bool(options) + [smaller] * (recipe != plan.recipe)
            found.append(Change(" ".join(said), tried.memory.peak_checkpointed if checkpointing else tried.memory.peak))
    return found


def count_parameters(model: PreTrainedModel) -> Parameters:
    """Count a model's parameters, and those of what is attached to it."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embeddings.weight
    return Parameters(
        total=sum(parameter.numel() for parameter in model.parameters()),
        trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        embeddings=sum(parameter.numel() for parameter in embeddings.parameters()),
        head=0 if tied else sum(parameter.numel() for parameter in head.parameters()),
        blocks=tuple(sum(p.numel() for p in block.parameters()) for block in model.get_decoder().layers),
        tied=tied,
    )
