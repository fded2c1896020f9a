"""From logits to the law a token is drawn from.

Shape legend: `V` vocabulary; `...` any leading dimensions.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from app.errors import ConfigError, check_range

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How a token is chosen; the default is greedy.

    Attributes:
        temperature: Divides the logits, at least 0; 0 is greedy: always the most probable token.
        top_k: Keep the k most probable tokens, at least 1; None keeps all.
        top_p: Then keep the smallest set of most probable tokens that holds this share, in (0, 1]; 1 keeps all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_range("temperature", self.temperature, low=0.0, high=float("inf"), high_open=True)
        if self.top_k is not None:
            check_range("top_k", self.top_k, low=1, fix="leave it out to keep every token")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError("top_p", got=self.top_p, allowed="(0, 1]")
        if self.greedy and (self.top_k is not None or self.top_p < 1.0):
            _log.warning("top_k and top_p have no effect at temperature 0 (greedy)")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0.0


def probabilities(logits: Tensor, *, settings: SamplingSettings) -> Tensor:
    """The law a token is drawn from: temperature, then top-k, then top-p, renormalised.

    Args:
        logits: Scores [..., V].
        settings: With a temperature above 0.

    Returns:
        Probabilities [..., V], at least float32; of equally probable tokens at the edge of top-k all are kept.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    # Subtracting the maximum first lets a tiny temperature end in a one-hot law, not in inf - inf.
    probs = ((logits - logits.amax(-1, keepdim=True)) / settings.temperature).softmax(-1)
    if settings.top_k is not None and settings.top_k < probs.shape[-1]:
        kth = probs.topk(settings.top_k).values[..., -1:]
        probs = probs.where(probs >= kth, 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    if settings.top_p < 1.0:
        descending, order = probs.sort(-1, descending=True)
        mass_before = descending.cumsum(-1) - descending
        probs = torch.zeros_like(probs).scatter(-1, order, descending.where(mass_before < settings.top_p, 0.0))
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def draw(probs_V: Tensor, *, generator: torch.Generator) -> Tensor:
    """One token id [1] from the law [V]."""
    return torch.multinomial(probs_V, 1, generator=generator)
