"""Cross entropy of a linear head in chunks: the logits are never there all at once, and are computed once.

Shape legend: `N` positions (of all, or of a chunk), `D` model width, `V` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from app.model.float32_products import fast_float32

_IGNORE_INDEX = -100  # as in F.cross_entropy
_MIN_LOGITS, _MAX_LOGITS = 2**20, 2**26  # of a chunk, where the vocabulary leaves a choice
_ADDED_ROWS = 1024  # of the head's gradient at a time


class WeightedCrossEntropy(torch.autograd.Function):
    """Scaled sum of cross entropies. Its gradients are computed with it, while a chunk's logits are there anyway.

    Until the backward it keeps the gradients of the hidden states and of the head, which the backward would need first
    thing; both are consumed by it, so that there is one backward only.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, scale_N: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The sum of `scale_N` times the cross entropies, and the cross entropies [N], without gradient."""
        losses_N, *gradients = cross_entropies(
            hidden_ND, weight_VD, labels_N, dtype=dtype, scale_N=scale_N, frozen_head=not ctx.needs_input_grad[1]
        )
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(losses_N)
        return (losses_N * scale_N).sum(), losses_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Scale what the forward left."""
        grad, _ = grads
        grad_hidden_ND, *grad_weight_VD = (gradient.mul_(grad) for gradient in ctx.saved_tensors)
        return grad_hidden_ND, grad_weight_VD[0] if grad_weight_VD else None, None, None, None


@torch.no_grad()
def cross_entropies(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    dtype: torch.dtype,
    scale_N: Tensor | None = None,
    frozen_head: bool = False,
) -> list[Tensor]:
    """Cross entropies [N] in nats, 0 where the label is ignored; with `scale_N` also the gradients of their sum.

    Args:
        hidden_ND: Normed hidden states.
        weight_VD: Of the head.
        labels_N: Classes, or -100 for none.
        dtype: Of the products; everything else is float32 (float64 for float64).
        scale_N: Weight of each position in the sum whose gradients to hidden_ND and weight_VD are wanted.
        frozen_head: No gradient to weight_VD.
    """
    exact = torch.promote_types(dtype, torch.float32)
    head_VD, targets_N1 = weight_VD.to(dtype), labels_N.clamp(min=0)[:, None]
    counted_N = (labels_N != _IGNORE_INDEX).to(exact)
    (num_rows, width), vocabulary = hidden_ND.shape, len(weight_VD)
    # As many rows as the weight's gradient has columns: then adding to it costs less than multiplying.
    chunk = max(1, min(num_rows, max(width, _MIN_LOGITS // vocabulary), _MAX_LOGITS // vocabulary))
    logits_buffer, shares_buffer = torch.empty(2, chunk, vocabulary, dtype=exact, device=hidden_ND.device)
    mixed = dtype != exact
    products_buffer = torch.empty_like(logits_buffer, dtype=dtype) if mixed else logits_buffer
    losses_N = torch.empty_like(counted_N)
    gradients: list[Tensor] = []
    if scale_N is not None:
        scale_N = scale_N * counted_N
        gradients.append(torch.empty_like(hidden_ND))
        if not frozen_head:
            gradients.append(torch.zeros_like(weight_VD, dtype=exact))
    product_VD = torch.empty_like(head_VD) if mixed and len(gradients) > 1 else None
    for start in range(0, num_rows, chunk):
        rows = slice(start, start + chunk)
        chunk_ND, target_N1 = hidden_ND[rows].to(dtype), targets_N1[rows]
        logits_NV, shares_NV, products_NV = (
            buffer[: len(chunk_ND)] for buffer in (logits_buffer, shares_buffer, products_buffer)
        )
        with fast_float32(hidden_ND.device):
            torch.mm(chunk_ND, head_VD.t(), out=products_NV)
        if mixed:
            logits_NV.copy_(products_NV)
        torch.softmax(logits_NV, dim=-1, out=shares_NV)
        log_sum_N1 = logits_NV.amax(-1, keepdim=True) - shares_NV.amax(-1, keepdim=True).log()
        losses_N[rows] = (log_sum_N1 - logits_NV.gather(-1, target_N1))[:, 0] * counted_N[rows]
        if scale_N is None:
            continue
        shares_NV.scatter_add_(-1, target_N1, -torch.ones_like(log_sum_N1))
        errors_NV = products_NV.copy_(shares_NV) if mixed else shares_NV
        scale_N1 = scale_N[rows, None]
        scaled_ND = (chunk_ND * scale_N1).to(dtype)
        with fast_float32(hidden_ND.device):
            gradients[0][rows] = (errors_NV @ head_VD) * scale_N1
            for grad_weight_VD in gradients[1:]:
                if mixed:
                    _add(grad_weight_VD, torch.mm(errors_NV.t(), scaled_ND, out=product_VD))
                else:
                    grad_weight_VD.addmm_(errors_NV.t(), scaled_ND)
    return [losses_N, *gradients]


def _add(total_VD: Tensor, product_VD: Tensor) -> None:
    """Add in slices: torch turns the whole of a bfloat16 product into float32 first, in memory paged in anew."""
    slices = zip(torch.split(total_VD, _ADDED_ROWS), torch.split(product_VD, _ADDED_ROWS), strict=True)
    for total, product in slices:
        total.add_(product)
