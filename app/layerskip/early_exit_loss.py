"""Early-exit loss J = sum_l w(t, l) CE(g(x_{l+1}), Y), LayerSkip (arXiv 2404.16710) section 4.1.2.

Shape legend: `E` exits that are on, `D` model width; `...` any shape of positions.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

IGNORE_INDEX = -100

# From the normed hidden states [..., D] of each exit, labels [...] and the weights of the exits to the weighted sum of
# losses, with gradient, and the losses [E, ...] without gradient, which are 0 where ignored.
WeightedLosses = Callable[[Sequence[Tensor], Tensor, Sequence[float]], tuple[Tensor, Tensor]]


class EarlyExitLoss(NamedTuple):
    """Sums, which the caller divides once by the global count of label tokens."""

    weighted_sum: Tensor  # scalar with gradient: sum_e w_e sum_tokens of the exit's loss, CE in the paper
    exit_sums: Tensor  # [E] sums of the losses over label tokens, detached
    num_label_tokens: Tensor  # scalar int64


def early_exit_loss(
    hidden_by_exit: Mapping[int, Tensor],
    labels: Tensor,
    weights: Mapping[int, float],
    weighted_losses: WeightedLosses,
) -> EarlyExitLoss:
    """Sum the losses of all exits with their weights, in one call of the head; cross entropies in the paper.

    J is `weighted_sum` over the label tokens of the whole step on all ranks. No gradient is stopped: each exit trains
    every block below it and the shared norm and head.

    Args:
        hidden_by_exit: exit_layer -> hidden states after the final norm [..., D]; only the exits of `weights`.
        labels: Target of each position [...] (already shifted), IGNORE_INDEX where there is none.
        weights: exit_layer -> w(t, l); sums to 1.
        weighted_losses: The head. It works in chunks, so that peak memory does not grow with E.
    """
    exits = sorted(weights)
    hidden = [hidden_by_exit[exit_layer] for exit_layer in exits]  # a list, since stacking would copy all of them
    weighted_sum, losses = weighted_losses(hidden, labels, [weights[exit_layer] for exit_layer in exits])
    return EarlyExitLoss(
        weighted_sum=weighted_sum,
        exit_sums=losses.flatten(1).sum(dim=1),
        num_label_tokens=(labels != IGNORE_INDEX).sum(),
    )
