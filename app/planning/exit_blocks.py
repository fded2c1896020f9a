"""What the training of exit blocks takes, found as that of a model is: by running a step without memory (`step`).

Shape legend: `B` rows, `T` tokens, `S` states of a token, `D` model width, `N` label tokens.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig, PreTrainedModel

from app.layerskip.distillation import DistillationLoss, divergence_loss
from app.layerskip.early_exit_loss import early_exit_loss
from app.model.config_check import build_without_memory
from app.model.early_exit import EarlyExitModel
from app.model.exit_block import exit_blocks_of
from app.model.head_loss import Teacher
from app.planning.memory import Layout, ask_optimizer, plan_memory
from app.planning.plan import ExitBlockPlan, Machine, Plan, count_parameters
from app.planning.recipe import Recipe
from app.planning.step import FLOP_FORMULAS, LiveBytes, Micro, MicroBatchCosts, refused_where_values_decide
from app.words import dtype_name

_MOST_LOGITS = 2**26  # that are run of the loss, which works in chunks: further tokens cost as those before


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """What exit blocks there are and what they learn from."""

    sources: Mapping[int, Sequence[int]]  # exit layer -> the model's blocks that its own begin as
    affine: Container[int] = ()  # exits with an affine map
    loss: DistillationLoss = "lk"
    num_ids: int | None = None  # rows of the head that the loss takes; None for all
    cached: torch.dtype | None = None  # type of the states on the disk; None if the frozen model runs in each step


@dataclass(frozen=True, kw_only=True)
class DistillationCosts(MicroBatchCosts):
    """FLOPs and bytes of a micro-batch that computes no block again; `base_flops` are those of exit blocks and head."""

    pass_flops: int  # one pass of the frozen model, without its head


def plan_exit_blocks(
    config: PreTrainedConfig,
    recipe: Recipe,
    configure: Callable[[nn.Module], Optimizer],
    *,
    learns: Distillation,
    layout: Layout,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    machine: Machine,
) -> Plan:
    """Find out what the training of exit blocks takes; each device holds the whole frozen model.

    Other arguments, and errors, are those of `app.planning.plan.plan_training`.
    """
    model, blocks, mode = fake_exit_blocks(config, learns, dtype=dtype)
    optimizer = ask_optimizer(configure, blocks.parameters())
    recipe = optimizer.completed(recipe, dtype)
    micro = Micro(
        batch_size=recipe.batch_size,
        seq_len=recipe.seq_len,
        num_exits=len(learns.sources),
        dtype=dtype,
        autocast=autocast,
    )
    costs = measure_distillation(model, blocks, mode, micro, learns)
    model.add_module("exit_blocks", blocks)
    memory = plan_memory(model, costs, optimizer, layout)
    micro_batches = recipe.accumulate * recipe.world_size
    pass_flops = 0 if learns.cached else costs.pass_flops * micro_batches
    step_flops = float(pass_flops + costs.base_flops * micro_batches)
    own = [*blocks.parameters()]
    return Plan(
        recipe=recipe,
        layout=layout,
        dtype=dtype_name(dtype),
        autocast=None if autocast is None else dtype_name(autocast),
        parameters=count_parameters(model),
        memory=memory,
        fits=machine.has_room_for(memory.peak),
        step_flops=step_flops,
        checkpoint_bytes=memory.weights + memory.optimizer_states,
        export_bytes=memory.weights,
        seconds_per_step=machine.seconds(step_flops, world_size=recipe.world_size),
        exit_blocks=ExitBlockPlan(
            parameters=sum(parameter.numel() for parameter in own),
            bytes=sum(parameter.nbytes for parameter in own),
            pass_flops=float(pass_flops),
            pass_flops_per_token=costs.pass_flops / (recipe.batch_size * recipe.seq_len),
        ),
    )


def fake_exit_blocks(
    config: PreTrainedConfig, learns: Distillation, *, dtype: torch.dtype
) -> tuple[PreTrainedModel, nn.ModuleDict, FakeTensorMode]:
    """Return a frozen model and its exit blocks, made of fake tensors, and the mode these live in."""
    model = build_without_memory(config, dtype=dtype)
    blocks = exit_blocks_of(model, learns.sources, affine=learns.affine)
    made = dict[Tensor, nn.Parameter]()  # of tied weights one
    with (mode := FakeTensorMode()):
        for module in (*model.modules(), *blocks.modules()):
            for name, parameter in [*module.named_parameters(recurse=False)]:
                if parameter not in made:
                    made[parameter] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype))
                setattr(module, name, made[parameter])
            for name, buffer in [*module.named_buffers(recurse=False)]:
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    model.requires_grad_(False)
    return model.eval(), blocks, mode


def measure_distillation(
    model: PreTrainedModel, blocks: nn.ModuleDict, mode: FakeTensorMode, micro: Micro, learns: Distillation
) -> DistillationCosts:
    """Run the step of `app.training.exit_block_steps` on fake tensors; classes of the model's blocks are swapped.

    Rows are taken to hold several documents each, so that attention has a mask.

    Raises:
        ConfigError: The architecture cannot be run so, for instance because shapes depend on values.
    """
    network = EarlyExitModel(model)
    with refused_where_values_decide(model), mode:
        known = [*model.parameters(), *model.buffers(), *blocks.parameters(), *blocks.buffers()]
        return _measure(network, blocks, micro, learns, known)


def _measure(
    network: EarlyExitModel, blocks: nn.ModuleDict, micro: Micro, learns: Distillation, known: Sequence[Tensor]
) -> DistillationCosts:
    num_labels, exits = micro.batch_size * micro.seq_len, [*learns.sources]
    vocab_size, width = network.head_shape
    run_labels = min(num_labels, max(1, _MOST_LOGITS // (learns.num_ids or vocab_size)))
    tokens_BT, positions_BT = torch.zeros(2, micro.batch_size, micro.seq_len, dtype=torch.long)
    labels_N, targets_N = torch.zeros(2, num_labels, dtype=torch.long)
    ids = None if learns.num_ids is None else torch.zeros(learns.num_ids, dtype=torch.long)
    live = LiveBytes([*known, tokens_BT, positions_BT, labels_N, targets_N])
    counter = FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS)
    counted = [0]
    with counter, live:
        with torch.autocast("cpu", dtype=micro.autocast or torch.bfloat16, enabled=micro.autocast is not None):
            states = network.states(tokens_BT, positions_BT, exits)
            counted.append(counter.get_total_flops())
            pass_peak = live.peak
            if learns.cached is not None:
                live.peak = pass_peak = 0
                batch_BTSD = torch.empty(*tokens_BT.shape, len(exits) + 1, width, dtype=learns.cached)
                cached = batch_BTSD.to(micro.dtype).unbind(dim=2)
                states = dict(zip((*exits, network.num_layers), cached, strict=True))
            hidden = {
                exit_layer: blocks[str(exit_layer)](states[exit_layer], positions_BT).flatten(0, 1)[targets_N]
                for exit_layer in exits
            }
            taught_ND = states[network.num_layers].flatten(0, 1)[targets_N]
            counted.append(counter.get_total_flops())
            before = live.now
            live.peak = max(before, pass_peak)
            head = partial(network.weighted_losses, token_ids=ids)
            if learns.loss != "cross_entropy":
                loss = partial(divergence_loss, learns.loss)
                head = partial(head, teacher=Teacher(taught_ND[:run_labels], [loss] * len(exits)))
            run = {exit_layer: hidden_ND[:run_labels] for exit_layer, hidden_ND in hidden.items()}
            summed = early_exit_loss(
                run, labels_N[:run_labels], dict.fromkeys(exits, 1 / len(exits)), head
            ).weighted_sum
            counted.append(counter.get_total_flops())
            peak = live.peak
        summed.backward()  # type: ignore[no-untyped-call]
        counted.append(counter.get_total_flops())
    in_pass, forward, in_loss, backward = (after - before for before, after in pairwise(counted))
    gradients = (num_labels - run_labels) * len(exits) * width * hidden[exits[0]].element_size()
    return DistillationCosts(
        pass_flops=in_pass,
        base_flops=forward + in_loss * num_labels // run_labels + backward,
        base_bytes=before,
        exit_loss_bytes=peak - before + gradients,
    )
