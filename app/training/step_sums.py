"""What an optimizer step adds up: loss sums over its micro-batches and ranks, with one reduction and one wait a step.

Shape legend: `W` ranks, `A` micro-batches of a step, `E` exits that are on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from app.layerskip.early_exit_loss import EarlyExitLoss


class StepTotals(NamedTuple):
    """Of all micro-batches and ranks, the same on every rank.

    Attributes:
        num_label_tokens: Targets that the loss is a mean over.
        exit_losses: exit_layer -> mean cross entropy, in nats a label token.
        grads_finite: Whether every rank found its gradient finite.
    """

    num_label_tokens: float
    exit_losses: dict[int, float]
    grads_finite: bool


class StepSums:
    """Collects one optimizer step; nothing leaves the device before `total`."""

    def __init__(self) -> None:
        self._micro_batches: list[Tensor] = []  # of each [1 + E]: label tokens, then the loss sum of every exit

    def clear(self) -> None:
        """Forget the step."""
        self._micro_batches = []

    def add(self, loss: EarlyExitLoss) -> None:
        """Take in one micro-batch of this rank."""
        self._micro_batches.append(torch.cat([loss.num_label_tokens.double().view(1), loss.exit_sums.double()]))

    def total(self, strategy: Strategy, exit_layers: Sequence[int], grad_norm: Tensor) -> StepTotals:
        """Sum over micro-batches and ranks; all ranks ask together.

        Args:
            strategy: What reduces over ranks.
            exit_layers: The exits that were on, ascending.
            grad_norm: Of this rank's gradient, a scalar; only whether it is finite is used. A replica can be damaged
                on one rank alone, so that each must hear of the others'.
        """
        norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
        local = torch.cat([torch.stack(self._micro_batches).sum(dim=0), (~torch.isfinite(norm)).double().view(1)])
        num_tokens, *sums, not_finite = strategy.reduce(local, reduce_op="sum").tolist()  # waits for the device
        losses = {layer: total / max(1.0, num_tokens) for layer, total in zip(exit_layers, sums, strict=True)}
        return StepTotals(num_tokens, losses, grads_finite=not not_finite)

    def not_finite_at(self) -> list[tuple[int, int]]:
        """(rank, micro-batch) of every loss that is not finite; all ranks ask together."""
        flags_AE = ~torch.isfinite(torch.stack(self._micro_batches)[:, 1:])
        flags_WA = gathered(flags_AE.any(dim=1))
        return [(int(rank), int(micro_batch)) for rank, micro_batch in flags_WA.nonzero().tolist()]


def gathered(flags_N: Tensor) -> Tensor:
    """Every rank's flags [N], as [W, N]; all ranks ask together."""
    own = flags_N.to(torch.uint8)
    if not dist.is_initialized():
        return own[None]
    everyones = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, own)
    return torch.stack(everyones)
