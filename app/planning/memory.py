"""What a training run keeps on each device: weights, gradients, optimizer states, activations and buffers."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from app.planning.recipe import Recipe
from app.planning.step import MicroBatchCosts

LayoutStrategy = Literal["single", "ddp", "fsdp2"]
_SIDE = 256  # largest side of a stand-in for a parameter
_GATHERED_BLOCKS = 2  # FSDP2 holds the block that runs, and the next one, which is fetched meanwhile


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the parameters are spread over devices."""

    strategy: LayoutStrategy = "single"  # single, ddp (a whole model on each device) or fsdp2 (each holds a part)
    shards: int = 1  # devices that one model is spread over
    bucket_views: bool = False  # DDP's gradients are views of its buckets, not copies
    # In mixed precision FSDP2 gathers weights in the dtype of the products and all else follows it (MeshStrategy).
    # Otherwise autocast copies weights that were gathered in their own dtype.
    gathers_cast: bool = False

    def local_numel(self, parameter: Tensor) -> int:
        """Count the parameter's elements on the fullest device; FSDP2 splits the first dimension."""
        first, *others = parameter.shape or (1,)
        return ceil(first / self.shards) * int(prod(others))


@dataclass(frozen=True, kw_only=True)
class OptimizerFacts:
    """How an optimizer treats parameters, as observed on small ones."""

    state_bytes: dict[tuple[int, ...], float]  # shape of a parameter -> bytes of state for each element
    step_bytes: int  # bytes for each element that a step needs for itself
    learning_rate: float  # the peak learning rate
    has_master_weights: bool  # whether it keeps a float32 copy of weights of a smaller dtype

    def completed(self, recipe: Recipe, dtype: torch.dtype) -> Recipe:
        """Return the recipe with the learning rate, and with what becomes of weights in this dtype."""
        small = dtype.itemsize < torch.float32.itemsize and not self.has_master_weights
        return replace(recipe, learning_rate=self.learning_rate, small_weights=small)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device; on the fullest one where devices differ."""

    weights: int
    gradients: int
    optimizer_states: int  # what the optimizer keeps between steps
    weight_copies: int  # weights of the blocks in the dtype of autocast, kept from forward to backward
    activations: int  # what the forward keeps for the backward, no block being dropped
    activations_checkpointed: int  # `activations` if every block kept its input alone
    recomputed_block: int  # what the block that is computed again keeps meanwhile
    exit_loss: int  # chunks of logits and the gradients of hidden states and head, with the most exits on
    communication: int  # FSDP2's gathered weights and gradients not yet spread, or DDP's buckets
    optimizer_step: int  # what the optimizer needs for itself in a step, when the activations are gone

    @property
    def peak(self) -> int:
        return self._peak(self.activations + self.weight_copies + self.exit_loss)

    @property
    def peak_checkpointed(self) -> int:
        """The peak with activation checkpointing of every block; the loss is over when blocks are computed again."""
        loss = self.weight_copies + self.exit_loss
        return self._peak(self.activations_checkpointed + max(loss, self.recomputed_block))

    def _peak(self, running: int) -> int:
        kept = self.weights + self.gradients + self.optimizer_states
        return kept + max(running + self.communication, self.optimizer_step)


def ask_optimizer(configure: Callable[[nn.Module], Optimizer], parameters: Iterable[Tensor]) -> OptimizerFacts:
    """Let the optimizer that `configure` makes step on small stand-ins for the parameters, and see what it keeps."""
    shapes = {tuple(parameter.shape): parameter.dtype for parameter in parameters}
    small = {
        shape: nn.Parameter(torch.rand([min(side, _SIDE) for side in shape]).to(dtype))
        for shape, dtype in shapes.items()
    }
    optimizer = configure(nn.ParameterList(small.values()))
    for parameter in small.values():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    state_bytes, masters = {}, []
    for shape, parameter in small.items():
        states = [state for state in tree_leaves(optimizer.state[parameter]) if isinstance(state, Tensor)]
        large = [state for state in states if state.numel() > 1]
        state_bytes[shape] = sum(state.nbytes for state in large) / parameter.numel()
        masters.append(any(_is_master(state, parameter) for state in large))
    defaults = optimizer.defaults
    # "uses ~ sizeof(params) more peak memory than the for-loop version": torch's documentation of foreach, its choice
    # on GPUs where neither is set.
    several = "foreach" in defaults and defaults["foreach"] is not False and not defaults.get("fused")
    return OptimizerFacts(
        state_bytes=state_bytes,
        step_bytes=max(dtype.itemsize for dtype in shapes.values()) if several else 0,
        learning_rate=float(defaults["lr"]),
        has_master_weights=all(masters),
    )


def _is_master(state: Tensor, parameter: Tensor) -> bool:
    finer = state.dtype.itemsize > parameter.dtype.itemsize
    return finer and state.shape == parameter.shape and torch.equal(state.to(parameter.dtype), parameter)


def plan_memory(
    model: PreTrainedModel,
    costs: MicroBatchCosts,
    optimizer: OptimizerFacts,
    layout: Layout,
    *,
    gathered: torch.dtype | None = None,
) -> Memory:
    """Add up what one device holds; FSDP2 gathers weights in the dtype `gathered`, by default in their own."""
    parameters = list(model.parameters())
    numels = [layout.local_numel(parameter) for parameter in parameters]
    weights = sum(numel * parameter.dtype.itemsize for numel, parameter in zip(numels, parameters, strict=True))
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    moved = [layout.local_numel(parameter) for parameter in trained]
    gradients = sum(numel * parameter.dtype.itemsize for numel, parameter in zip(moved, trained, strict=True))
    states = (optimizer.state_bytes[tuple(parameter.shape)] for parameter in trained)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer_states=int(sum(numel * state for numel, state in zip(moved, states, strict=True))),
        weight_copies=sum(costs.copy_bytes),
        activations=costs.activation_bytes,
        activations_checkpointed=costs.checkpointed_bytes,
        recomputed_block=costs.recomputed_bytes,
        exit_loss=costs.exit_loss_bytes,
        communication=_communication(model, layout, gradients=gradients, gathered=gathered),
        optimizer_step=sum(moved) * optimizer.step_bytes,
    )


def _communication(model: PreTrainedModel, layout: Layout, *, gradients: int, gathered: torch.dtype | None) -> int:
    if layout.strategy == "ddp":
        return 0 if layout.bucket_views else gradients
    if layout.strategy == "single" or layout.shards == 1:
        return 0
    parameters: int = sum(parameter.numel() for parameter in model.parameters())
    blocks: list[int] = [
        sum(parameter.numel() for parameter in block.parameters()) for block in model.get_decoder().layers
    ]
    own: int = next(model.parameters()).dtype.itemsize
    itemsize = own if gathered is None else gathered.itemsize
    # Everything outside the blocks is one group, gathered for the whole step (app.model.parallel.shard); a block's
    # gradients are there once as they are made, once as they are sent, in the weights' own dtype.
    outside = 2 * itemsize * (parameters - sum(blocks))
    return outside + (_GATHERED_BLOCKS * itemsize + itemsize + own) * max(blocks)
