"""Early-exit loss J = sum_l w(t, l) CE(g(x_{l+1}), Y), LayerSkip (arXiv 2404.16710) section 4.1.2.

Shape legend: `E` exits that are on, `D` model width; `...` any shape of positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

IGNORE_INDEX = -100

# (normed hidden states [..., D] of each exit, labels [...], weights of the exits) -> the weighted sum of cross
# entropies, with gradient, and the cross entropies [E, ...], 0 where ignored, without.
WeightedLosses = Callable[[Sequence[Tensor], Tensor, Sequence[float]], tuple[Tensor, Tensor]]


class EarlyExitLoss(NamedTuple):
    """Sums, not means: the caller divides once, by the global count of label tokens."""

    weighted_sum: Tensor  # scalar with gradient: sum_e w_e sum_tokens CE
    exit_sums: Tensor  # [E] sums of CE over label tokens, detached
    num_label_tokens: Tensor  # scalar int64


def early_exit_loss(
    hidden_by_exit: Mapping[int, Tensor],
    labels: Tensor,
    weights: Mapping[int, float],
    weighted_losses: WeightedLosses,
) -> EarlyExitLoss:
    """Weighted sum over exits of the summed cross entropies, with one call of the head for all exits.

    No stop-gradient: each exit trains every block below it and the shared norm and head.

    Args:
        hidden_by_exit: exit_layer -> hidden states after the final norm [..., D]; only the exits of `weights`.
        labels: Target of each position [...] (already shifted), IGNORE_INDEX where there is none.
        weights: exit_layer -> w(t, l); sums to 1.
        weighted_losses: The head; it must bound its own memory (chunks), so that peak memory does not grow with E.

    Returns:
        Sums over this micro-batch; J is `weighted_sum` / (label tokens of the whole step on all ranks).
    """
    exits = sorted(weights)
    hidden = [hidden_by_exit[exit_layer] for exit_layer in exits]  # not stacked: that would copy all of them
    weighted_sum, losses = weighted_losses(hidden, labels, [weights[exit_layer] for exit_layer in exits])
    return EarlyExitLoss(
        weighted_sum=weighted_sum,
        exit_sums=losses.flatten(1).sum(dim=1),
        num_label_tokens=(labels != IGNORE_INDEX).sum(),
    )
