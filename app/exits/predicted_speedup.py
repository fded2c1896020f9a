"""What drafting from an exit would gain, by the cost model, as long as nothing has been timed."""

from app.decoding.cost_model import CostModel, tokens_per_round
from app.protocols import DraftSize

_EXTRA_TOKEN = 0.02  # k where a pass over several positions is bound by reading the weights, as on most devices
_MOST_DRAFTS = 16


def predicted_speedup(agreement: float, *, exit_layer: int, num_layers: int, size: DraftSize) -> float:
    """Speedup of greedy decoding at the best number of drafts, where each is accepted with probability `agreement`.

    A draft costs E + A + H_d blocks. `layerskip tune` measures on the machine at hand what this assumes.
    """
    costs = CostModel.self_speculative(
        num_layers=num_layers,
        exit_layer=exit_layer,
        head=size.head_blocks,
        draft_head=size.draft_head_blocks,
        num_exit_blocks=size.exit_blocks,
        extra_token=_EXTRA_TOKEN,
    )
    return max(costs.speedup(tokens_per_round(agreement, drafts), drafts) for drafts in range(1, _MOST_DRAFTS + 1))
