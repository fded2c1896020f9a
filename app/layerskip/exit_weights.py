"""Weights of the early-exit losses, LayerSkip (arXiv 2404.16710) section 4.1.2."""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

ExitWeights = Literal["quadratic", "linear", "uniform"]

# e(l) as a function of (layer_idx, num_layers, early_exit_scale). It depends on l alone, never on which other exits are
# on. In every table scale 0 leaves the last layer only, so that the loss is plain cross entropy.
EXIT_WEIGHTS: Mapping[ExitWeights, Callable[[int, int, float], float]] = {
    # The paper's: e(l) = s l(l+1)/2 below the last layer, e(L-1) = (L-1) + s (L-2)(L-1)/2.
    "quadratic": lambda idx, count, scale: (
        scale * idx * (idx + 1) / 2 if idx < count - 1 else (count - 1) + scale * (count - 2) * (count - 1) / 2
    ),
    "linear": lambda idx, count, scale: scale * idx if idx < count - 1 else float(count - 1),
    "uniform": lambda idx, count, scale: scale if idx < count - 1 else 1.0,
}


def exit_weight(layer_idx: int, *, num_layers: int, early_exit_scale: float, kind: ExitWeights = "quadratic") -> float:
    """e(l), paper section 4.1.2, unnormalised, for the exit after block `layer_idx`."""
    if num_layers == 1:
        return 1.0  # the only exit is the full model, whatever the table
    return EXIT_WEIGHTS[kind](layer_idx, num_layers, early_exit_scale)


def normalised_exit_weights(
    exit_layers: Iterable[int], *, num_layers: int, early_exit_scale: float, kind: ExitWeights = "quadratic"
) -> dict[int, float]:
    """w(t, l) = C(t, l) e(l) / sum_i C(t, i) e(i), paper section 4.1.2, over the exits that are on (1..num_layers).

    Returns:
        exit_layer -> weight; the weights sum to 1. Exits of weight 0 (e(0) = 0 in the paper's table) are left out,
        since unembedding them would gain nothing.

    Raises:
        ValueError: No exit that is on has a positive weight.
    """
    raw = {
        layer: exit_weight(layer - 1, num_layers=num_layers, early_exit_scale=early_exit_scale, kind=kind)
        for layer in sorted(exit_layers)
    }
    total = sum(raw.values())
    if total <= 0:
        raise ValueError(f"no exit of positive weight among {sorted(raw)} of {num_layers} layers ({kind} weights)")
    return {layer: weight / total for layer, weight in raw.items() if weight > 0}
