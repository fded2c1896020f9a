"""Early-exit loss J = sum_l w(t, l) CE(g(x_{l+1}), Y), LayerSkip (arXiv 2404.16710) section 4.1.2.

Shape legend: `E` exits that are on, `B` sequences, `T` tokens, `D` model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100

# (normed hidden states [E, B, T, D], labels [E, B, T]) -> cross entropies [E, B, T], 0 where ignored.
TokenLosses = Callable[[Tensor, Tensor], Tensor]


class EarlyExitLoss(NamedTuple):
    """Sums, not means: the caller divides once, by the global count of label tokens."""

    weighted_sum: Tensor  # scalar with gradient: sum_e w_e sum_tokens CE
    exit_sums: Tensor  # [E] sums of CE over label tokens, detached
    num_label_tokens: Tensor  # scalar int64


def early_exit_loss(
    hidden_by_exit: Mapping[int, Tensor],
    labels_BT: Tensor,
    weights: Mapping[int, float],
    token_losses: TokenLosses,
) -> EarlyExitLoss:
    """Weighted sum over exits of the summed cross entropies, with one call of the head for all exits.

    No stop-gradient: each exit trains every block below it and the shared norm and head.

    Args:
        hidden_by_exit: exit_layer -> hidden states after the final norm [B, T, D]; only the exits of `weights`.
        labels_BT: Target of each position (already shifted), IGNORE_INDEX where there is none.
        weights: exit_layer -> w(t, l); sums to 1.
        token_losses: The head; it must bound its own memory (chunks), so that peak memory does not grow with E.

    Returns:
        Sums over this micro-batch; J is `weighted_sum` / (label tokens of the whole step on all ranks).
    """
    exits = sorted(weights)
    hidden_EBTD = torch.stack([hidden_by_exit[exit_layer] for exit_layer in exits])
    labels_EBT = labels_BT.expand(len(exits), *labels_BT.shape)
    exit_sums = token_losses(hidden_EBTD, labels_EBT).sum(dim=(1, 2))
    weight_E = exit_sums.new_tensor([weights[exit_layer] for exit_layer in exits])
    return EarlyExitLoss(
        weighted_sum=(weight_E * exit_sums).sum(),
        exit_sums=exit_sums.detach(),
        num_label_tokens=(labels_BT != IGNORE_INDEX).sum(),
    )
