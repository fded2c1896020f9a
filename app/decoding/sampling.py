"""From logits to the law a token is drawn from.

Shape legend: `S` tokens so far, `V` vocabulary; `...` any leading dimensions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from app.errors import ConfigError, check_range

_log = logging.getLogger(__name__)

# Token ids of one sequence so far [1, S] and the scores of the next token [1, V] -> new scores [1, V]; any
# transformers LogitsProcessor or LogitsProcessorList whose result depends on these two alone and leaves some token
# possible.
LogitsProcessor = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How a token is chosen; the default is greedy.

    Attributes:
        temperature: Divides the logits, at least 0; 0 is greedy: always the most probable token.
        top_k: Keep the k most probable tokens, at least 1; None keeps all.
        top_p: Then keep the smallest set of most probable tokens that holds this share, in (0, 1]; 1 keeps all.
        min_p: Then keep the tokens at least this share as probable as the most probable one, in [0, 1]; 0 keeps all.
        processor: Applied to the scores of every token, drafted or verified, before all of these, greedy or not.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    processor: LogitsProcessor | None = None

    def __post_init__(self) -> None:
        check_range("temperature", self.temperature, low=0.0, high=float("inf"), high_open=True)
        if self.top_k is not None:
            check_range("top_k", self.top_k, low=1, fix="leave it out to keep every token")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError("top_p", got=self.top_p, allowed="(0, 1]")
        check_range("min_p", self.min_p, low=0.0, high=1.0)
        if self.greedy and (self.top_k is not None or self.top_p < 1.0 or self.min_p > 0.0):
            _log.warning("top_k, top_p and min_p have no effect at temperature 0 (greedy)")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0.0


def probabilities(logits: Tensor, *, settings: SamplingSettings) -> Tensor:
    """The law a token is drawn from: temperature, then top-k, then top-p, then min-p, renormalised.

    Args:
        logits: Scores [..., V].
        settings: With a temperature above 0.

    Returns:
        Probabilities [..., V], at least float32; of equally probable tokens at the edge of top-k all are kept.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    # Subtracting the maximum first lets a tiny temperature end in a one-hot law, not in inf - inf.
    temperature = max(settings.temperature, torch.finfo(logits.dtype).tiny)
    probs = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if settings.top_k is not None and settings.top_k < probs.shape[-1]:
        kth = probs.topk(settings.top_k).values[..., -1:]
        probs = probs.where(probs >= kth, 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    if settings.top_p < 1.0:
        descending, order = probs.sort(-1, descending=True)
        mass_before = descending.cumsum(-1) - descending
        probs = torch.zeros_like(probs).scatter(-1, order, descending.where(mass_before < settings.top_p, 0.0))
        probs = probs / probs.sum(-1, keepdim=True)
    if settings.min_p > 0.0:
        probs = probs.where(probs >= settings.min_p * probs.amax(-1, keepdim=True), 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def draw(probs_V: Tensor, *, generator: torch.Generator) -> Tensor:
    """One token id [1] from the law [V], by its inverse distribution function: one random number, no wait.

    `torch.multinomial` checks its input on the host and takes many times as long over a large vocabulary.
    """
    sums_V = probs_V.double().cumsum(-1)
    threshold_1 = torch.rand(1, generator=generator, dtype=torch.float64, device=probs_V.device) * sums_V[-1:]
    return torch.searchsorted(sums_V, threshold_1, right=True)  # right: never a token of probability 0
