"""Losses that teach an exit the full model's distribution (method card, "Exit blocks and distillation").

With p = softmax of the full model's logits, which learns nothing here, and q = softmax of the exit's:

    KL = sum p log(p/q),   TV = 1/2 sum |p - q|,   LK = c KL + (1 - c) TV with c = exp(-3 a) and a = 1 - TV.

a is the chance that a draft sampled from q is accepted. Pure TV has hardly any gradient as long as p and q are far
apart, so LK begins as KL and turns into TV as acceptance grows (arXiv 2602.23881; the exact form of c is our reading).

Shape legend: `N` positions, `V` vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

_PIECE = 2**17  # logits that are compared at a time

Divergence = Literal["kl", "total_variation", "lk"]
DistillationLoss = Literal["cross_entropy", Divergence]  # cross_entropy is that of the text's labels
RecipeLoss = Literal["cross_entropy", "kl"]  # of the early exits of the original recipe

# c as a function of the acceptance a [N], which counts as a constant in the gradient; the loss is c KL + (1 - c) TV.
KL_SHARES: Mapping[Divergence, Callable[[Tensor], Tensor]] = {
    "kl": torch.ones_like,
    "total_variation": torch.zeros_like,
    "lk": lambda acceptance_N: torch.exp(-3.0 * acceptance_N),
}


class Divergences(NamedTuple):
    """How far q is from p at each position."""

    kl_N: Tensor  # in nats
    total_variation_N: Tensor  # in [0, 1]; one minus it is the chance that a sampled draft is accepted


def divergences(draft_NV: Tensor, full_NV: Tensor) -> Divergences:
    """KL and TV of the exit's logits and the full model's, of the same dtype."""
    pieces = [_compared(*piece)[0] for piece in _pieces(draft_NV, full_NV)]
    return Divergences(*map(torch.cat, zip(*pieces, strict=True)))


def divergence_loss(
    kind: Divergence, draft_NV: Tensor, full_NV: Tensor, gradient_NV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loss [N] in nats, and its gradient [N, V] with respect to the exit's logits, in closed form.

    With s = 1/2 sign(q - p) the gradient of KL is q - p, that of TV q (s - sum q s). Both logits are of the same dtype,
    of at least one row. The gradient is written to `gradient_NV`, which may be `draft_NV`; None takes new memory.
    """
    gradient_NV = torch.empty_like(draft_NV) if gradient_NV is None else gradient_NV
    losses = []
    for draft, full, gradient in _pieces(draft_NV, full_NV, gradient_NV):
        (kl, total_variation), q, excess = _compared(draft, full)
        share = KL_SHARES[kind](1 - total_variation)
        slope = excess.sign().div_(2)
        slope.sub_((q * slope).sum(-1, keepdim=True)).mul_(q)
        torch.lerp(slope, excess, share[:, None], out=gradient)
        losses.append(total_variation.lerp(kl, share))
    return torch.cat(losses), gradient_NV


def _pieces(*tensors_NV: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A few rows at a time. What fits the processor's cache is computed ten times as fast, without new pages."""
    rows = max(1, _PIECE // tensors_NV[0].shape[-1])
    return zip(*(torch.split(tensor, rows) for tensor in tensors_NV), strict=True)


def _compared(draft_NV: Tensor, full_NV: Tensor) -> tuple[Divergences, Tensor, Tensor]:
    """The divergences, q, and q - p."""
    p_NV, q_NV = full_NV.softmax(-1), draft_NV.softmax(-1)
    excess_NV = q_NV - p_NV
    # log p - log q is the logits' difference up to a constant of the row; log_softmax would take five times as long.
    constant_N = _log_sum(full_NV, p_NV) - _log_sum(draft_NV, q_NV)
    kl_N = p_NV.mul_(full_NV - draft_NV).sum(-1) - constant_N
    return Divergences(kl_N, excess_NV.abs().sum(-1).div_(2)), q_NV, excess_NV


def _log_sum(logits_NV: Tensor, softmax_NV: Tensor) -> Tensor:
    return logits_NV.amax(-1) - softmax_NV.amax(-1).log()
