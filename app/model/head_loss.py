"""Computes the losses of a linear head in chunks, so that the whole logits are never in memory.

Shape legend: `E` exits, `N` positions (of all, or of a chunk), `D` model width, `V` vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_IGNORE_INDEX = -100  # the label of no class, as in F.cross_entropy
_MIN_LOGITS, _MAX_LOGITS = 2**20, 2**26  # in a chunk, where the vocabulary leaves a choice
_ADDED_ROWS = 1024  # rows of the head's gradient that are added at a time


# From the logits [N, V] of an exit and of the full model, and a buffer of their shape, to the losses [N] and their
# gradient with respect to the exit's logits, in the buffer.
LossOfLogits = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Teacher(NamedTuple):
    """What exits learn from instead of the labels."""

    normed: Tensor  # the full model's hidden states [N, D] after the final norm; they get no gradient
    losses: Sequence[LossOfLogits | None]  # of each exit; for None it learns from the labels


class WeightedTokenLosses(torch.autograd.Function):
    """Weighted sum of token losses, whose gradients the forward computes while a chunk's logits are in memory.

    It keeps the gradients of the hidden states and of the head. The backward scales them in place, so there can be
    only one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight_VD: Tensor,
        labels_N: Tensor,
        weights: Sequence[float],
        teacher: Teacher | None,
        dtype: torch.dtype,
        *hidden: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Weighted sum of the losses of each exit's hidden states [N, D], and the losses [E, N]."""
        frozen = not ctx.needs_input_grad[0]
        losses_EN, *gradients = token_losses(
            hidden, weight_VD, labels_N, dtype=dtype, weights=weights, frozen_head=frozen, teacher=teacher
        )
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(losses_EN)
        return losses_EN.new_tensor(weights) @ losses_EN.sum(dim=1), losses_EN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients that the forward kept."""
        grad, _ = grads
        scaled = [gradient.mul_(grad) for gradient in ctx.saved_tensors]
        grad_weight_VD = scaled.pop() if ctx.needs_input_grad[0] else None
        return grad_weight_VD, None, None, None, None, *scaled


@torch.no_grad()
def token_losses(
    hidden: Sequence[Tensor],
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    dtype: torch.dtype,
    weights: Sequence[float] | None = None,
    frozen_head: bool = False,
    teacher: Teacher | None = None,
) -> list[Tensor]:
    """Losses [E, N] in nats; with `weights` also the gradients of their weighted sum.

    Args:
        hidden: Normed hidden states [N, D] of each exit.
        labels_N: Classes, the same for all exits; -100 gives a loss of 0.
        dtype: Type of the products; all else is float32, or float64 for float64.
        weights: Weight of each exit; the gradients with respect to each of `hidden` and then to `weight_VD` follow.
        frozen_head: Leaves out the gradient with respect to `weight_VD`.
        teacher: Gives exits another loss than the cross entropy of the labels; only with `weights`.
    """
    exact, device = torch.promote_types(dtype, torch.float32), labels_N.device
    head_VD, targets_N1 = weight_VD.to(dtype), labels_N.clamp(min=0)[:, None]
    counted_N = (labels_N != _IGNORE_INDEX).to(exact)
    num_rows, (vocabulary, width) = len(labels_N), weight_VD.shape
    # With as many rows as the weight's gradient has columns, adding to it costs less than multiplying.
    chunk = max(1, min(num_rows, max(width, _MIN_LOGITS // vocabulary), _MAX_LOGITS // vocabulary))
    buffers = torch.empty(2 if teacher is None else 3, chunk, vocabulary, dtype=exact, device=device)
    products = torch.empty_like(buffers[0], dtype=dtype) if dtype != exact else None
    losses_EN = torch.empty(len(hidden), num_rows, dtype=exact, device=device)
    gradients = [] if weights is None else [torch.empty_like(hidden_ND) for hidden_ND in hidden]
    wanted_weight = weights is not None and not frozen_head
    grad_weight_VD = torch.zeros_like(weight_VD, dtype=exact) if wanted_weight else None
    product_VD = torch.empty_like(head_VD) if products is not None and wanted_weight else None
    for start in range(0, num_rows, chunk):
        rows = slice(start, start + chunk)
        target_N1, counted_N1 = targets_N1[rows], counted_N[rows, None]
        logits_NV, shares_NV, *full_NV = buffers[:, : len(target_N1)]
        products_NV = logits_NV if products is None else products[: len(target_N1)]
        if teacher is not None:
            full_NV[0].copy_(torch.mm(teacher.normed[rows].to(dtype), head_VD.t(), out=products_NV))
        for exit_idx, hidden_ND in enumerate(hidden):
            chunk_ND = hidden_ND[rows].to(dtype)
            torch.mm(chunk_ND, head_VD.t(), out=products_NV)
            if products is not None:
                logits_NV.copy_(products_NV)
            if teacher is not None and (loss_of_logits := teacher.losses[exit_idx]) is not None:
                losses_EN[exit_idx, rows], errors_NV = loss_of_logits(logits_NV, full_NV[0], shares_NV)
            else:
                losses_EN[exit_idx, rows], errors_NV = _cross_entropy(logits_NV, target_N1, shares_NV)
            if weights is None:
                continue
            if products is not None:
                errors_NV = products_NV.copy_(errors_NV)
            scale_N1 = weights[exit_idx] * counted_N1
            gradients[exit_idx][rows] = (errors_NV @ head_VD) * scale_N1
            if grad_weight_VD is not None:
                _add_product(grad_weight_VD, errors_NV, (chunk_ND * scale_N1).to(dtype), product_VD)
    return [losses_EN.mul_(counted_N), *gradients, *([] if grad_weight_VD is None else [grad_weight_VD])]


def _cross_entropy(logits_NV: Tensor, targets_N1: Tensor, errors_NV: Tensor) -> tuple[Tensor, Tensor]:
    """The cross entropies [N], and their gradient, which is written to `errors_NV`."""
    torch.softmax(logits_NV, dim=-1, out=errors_NV)
    log_sum_N1 = logits_NV.amax(-1, keepdim=True) - errors_NV.amax(-1, keepdim=True).log()
    losses_N = (log_sum_N1 - logits_NV.gather(-1, targets_N1))[:, 0]
    return losses_N, errors_NV.scatter_add_(-1, targets_N1, -torch.ones_like(log_sum_N1))


def _add_product(total_VD: Tensor, errors_NV: Tensor, scaled_ND: Tensor, buffer_VD: Tensor | None) -> None:
    """Add errors^T @ scaled; a bfloat16 one in slices, since torch first copies what it adds to float32."""
    if buffer_VD is None:
        total_VD.addmm_(errors_NV.t(), scaled_ND)
        return
    product_VD = torch.mm(errors_NV.t(), scaled_ND, out=buffer_VD)
    slices = zip(torch.split(total_VD, _ADDED_ROWS), torch.split(product_VD, _ADDED_ROWS), strict=True)
    for total, product in slices:
        total.add_(product)
