"""Measures how good each exit is on held-out tokens: loss, perplexity, and how near it is to the full model.

Shape legend: `B` sequences, `T` tokens, `D` model width, `V` vocabulary, `E` exits, `G` groups.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from app.layerskip.distillation import divergences
from app.layerskip.early_exit_loss import IGNORE_INDEX
from app.model.exact_tables import Conversion, moving_only

_SUMS = ("loss_sum_E", "agreeing_E", "kl_sum_E", "accepted_E")  # in the order of ExitScore
_TOKENS_PER_CHUNK = 512  # their logits take 64 MiB in fp32 at a vocabulary of 32k


class GroupedTokenLoss(Metric):
    """Mean loss of a token, over all tokens and within each group of rows, such as a data source."""

    loss_sum_G: Tensor
    count_G: Tensor

    def __init__(self, num_groups: int) -> None:
        super().__init__()
        self.add_state("loss_sum_G", torch.zeros(num_groups, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count_G", torch.zeros(num_groups, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, losses_BT: Tensor, counted_BT: Tensor, group_B: Tensor) -> None:
        """Add the cross entropies where `counted_BT`; the others are 0."""
        self.loss_sum_G.index_add_(0, group_B, losses_BT.sum(dim=1, dtype=torch.float64))
        self.count_G.index_add_(0, group_B, counted_BT.sum(dim=1).double())

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return the mean over all tokens, and the mean of each group [G], NaN for a group without tokens."""
        return self.loss_sum_G.sum() / self.count_G.sum(), self.loss_sum_G / self.count_G

    def _apply(self, fn: Conversion, exclude_state: Sequence[str] = ()) -> nn.Module:
        return super()._apply(moving_only(fn), exclude_state)  # bf16-true, which converts the module, keeps sums exact


class ExitScore(NamedTuple):
    """Held-out quality of one exit."""

    loss: float  # nats a token
    agreement: float  # share of tokens whose top-1 equals the full model's
    kl: float = math.nan  # KL of the full model's distribution from the exit's, in nats a token
    acceptance: float = math.nan  # 1 - TV: the chance that a token sampled from the exit is accepted

    @property
    def perplexity(self) -> float:
        return float(torch.tensor(self.loss, dtype=torch.float64).exp())


class ExitQuality(Metric):
    """The figures of ExitScore for `exit_layers`, over batches and ranks; exit `num_layers` is the full model."""

    loss_sum_E: Tensor
    agreeing_E: Tensor
    kl_sum_E: Tensor
    accepted_E: Tensor
    count: Tensor

    def __init__(self, exit_layers: Sequence[int], *, num_layers: int) -> None:
        super().__init__()
        self.exit_layers, self.num_layers = tuple(exit_layers), num_layers
        for name in _SUMS:
            self.add_state(name, torch.zeros(len(self.exit_layers), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(1, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        hidden_by_exit: Mapping[int, Tensor],
        labels_BT: Tensor,
        head: Callable[[Tensor], Tensor],
        *,
        draft_ids_V: Tensor | None = None,
    ) -> None:
        """Add a batch; logits exist for one chunk of tokens at a time.

        Args:
            hidden_by_exit: exit_layer -> normed hidden states [B, T, D], the full model's among them.
            head: The LM head, from [N, D] to [N, V].
            draft_ids_V: The V' token ids that drafts are chosen from; None for all. Agreement and acceptance are then
                those of such drafts, and KL is that given that the token is one of them.
        """
        counted = labels_BT != IGNORE_INDEX
        for rows in torch.split(counted.flatten().nonzero().squeeze(1), _TOKENS_PER_CHUNK):
            labels_N = labels_BT.flatten()[rows]
            full_logits = head(hidden_by_exit[self.num_layers].flatten(0, 1)[rows]).float()
            full_choice = full_logits.argmax(dim=-1)
            for idx, layer in enumerate(self.exit_layers):
                full = layer == self.num_layers
                logits = full_logits if full else head(hidden_by_exit[layer].flatten(0, 1)[rows]).float()
                self.loss_sum_E[idx] += F.cross_entropy(logits, labels_N, reduction="sum").double()
                if full or draft_ids_V is None:
                    choice, (kl_N, total_variation_N) = logits.argmax(dim=-1), divergences(logits, full_logits)
                    accepted_N = 1 - total_variation_N
                else:
                    logits = logits[:, draft_ids_V]
                    choice = draft_ids_V[logits.argmax(dim=-1)]
                    kl_N, _ = divergences(logits, full_logits[:, draft_ids_V])
                    accepted_N = logits.softmax(-1).minimum(full_logits.softmax(-1)[:, draft_ids_V]).sum(-1)
                self.agreeing_E[idx] += (choice == full_choice).sum()
                self.kl_sum_E[idx] += kl_N.double().sum()
                self.accepted_E[idx] += accepted_N.double().sum()
            self.count += len(rows)

    def compute(self) -> dict[int, ExitScore]:
        """Return the score of each exit layer, or nothing if no token was seen."""
        if not self.count:
            return {}
        means = torch.stack([getattr(self, name) for name in _SUMS]) / self.count
        return {layer: ExitScore(*means[:, idx].tolist()) for idx, layer in enumerate(self.exit_layers)}
