"""The sums of an optimizer step over its micro-batches and ranks, with one reduction and one wait a step.

Shape legend: `W` ranks, `A` micro-batches of a step, `E` exits that are on. Tested by
tests/unit/training/test_token_mean.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from app.layerskip.early_exit_loss import EarlyExitLoss


class StepTotals(NamedTuple):
    """Totals over all micro-batches and ranks, the same on every rank."""

    num_label_tokens: float
    exit_losses: dict[int, float]  # exit_layer -> mean cross entropy, in nats a label token
    grads_finite: bool  # on every rank


class StepSums:
    """Collects one optimizer step; nothing leaves the device before `total`."""

    def __init__(self) -> None:
        self._micro_batches: list[Tensor] = []  # [1 + E] each: label tokens, then the loss sum of every exit

    def clear(self) -> None:
        """Forget the step."""
        self._micro_batches = []

    def add(self, loss: EarlyExitLoss) -> None:
        """Add one micro-batch of this rank."""
        self._micro_batches.append(torch.cat([loss.num_label_tokens.double().view(1), loss.exit_sums.double()]))

    def total(self, strategy: Strategy, exit_layers: Sequence[int], grad_norm: Tensor) -> StepTotals:
        """Sum over micro-batches and ranks, all ranks together, for the exits that were on, ascending.

        Of `grad_norm`, a scalar, only whether it is finite is used: a replica can be damaged on one rank alone.
        """
        norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
        local = torch.cat([torch.stack(self._micro_batches).sum(dim=0), (~torch.isfinite(norm)).double().view(1)])
        num_tokens, *sums, not_finite = strategy.reduce(local, reduce_op="sum").tolist()  # waits for the device
        losses = {layer: total / max(1.0, num_tokens) for layer, total in zip(exit_layers, sums, strict=True)}
        return StepTotals(num_tokens, losses, grads_finite=not not_finite)

    def not_finite_at(self) -> list[tuple[int, int]]:
        """(rank, micro-batch) of every loss that is not finite; all ranks together."""
        flags_AE = ~torch.isfinite(torch.stack(self._micro_batches)[:, 1:])
        flags_WA = gathered(flags_AE.any(dim=1))
        return [(int(rank), int(micro_batch)) for rank, micro_batch in flags_WA.nonzero().tolist()]


def gathered(flags_N: Tensor) -> Tensor:
    """The flags [N] of every rank, as [W, N]; all ranks together."""
    own = flags_N.to(torch.uint8)
    if not dist.is_initialized():
        return own[None]
    of_ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, own)
    return torch.stack(of_ranks)
