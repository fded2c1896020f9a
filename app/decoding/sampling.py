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
_CANDIDATES = 1024  # of the most probable tokens, which nearly always hold top_p; finding them is faster than sorting

# Token ids of one sequence so far [1, S] and the scores of the next token [1, V] -> new scores [1, V]; any
# transformers LogitsProcessor or LogitsProcessorList whose result depends on these two alone and leaves some token
# possible. The ids are a view of memory that the next round writes to: to be read at once, and never changed.
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
        few = min(_CANDIDATES, (settings.top_k or _CANDIDATES) + 1)  # one more: 0, unless there are ties
        probs = _most_probable(probs.reshape(-1, probs.shape[-1]), top_p=settings.top_p, few=few).view_as(probs)
        probs = probs / probs.sum(-1, keepdim=True)
    if settings.min_p > 0.0:
        probs = probs.where(probs >= settings.min_p * probs.amax(-1, keepdim=True), 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def _most_probable(probs_NV: Tensor, *, top_p: float, few: int) -> Tensor:
    """Top-p before it is renormalised: a token stays if those before it hold less than `top_p`.

    More probable tokens are before less probable ones, and lower ids before higher ones of the same probability. On a
    CPU only laws whose first `few` tokens hold too little are sorted as a whole; to look for them would make the host
    wait for any other device.
    """
    all_sorted = probs_NV.device.type != "cpu" or probs_NV.shape[-1] <= _CANDIDATES
    descending = probs_NV.sort(-1, descending=True).values if all_sorted else probs_NV.topk(few).values
    least_N1, ties_N1, too_few_N = _edge(descending, top_p)
    if not all_sorted and too_few_N.any():
        whole = probs_NV[too_few_N].sort(-1, descending=True).values
        least_N1[too_few_N], ties_N1[too_few_N], _ = _edge(whole, top_p)
    place_NV = (probs_NV == least_N1).cumsum(-1, dtype=torch.int32)  # among tied tokens, from 1 on
    return probs_NV.where((probs_NV > least_N1) | (probs_NV == least_N1) & (place_NV <= ties_N1), 0.0)


def _edge(descending: Tensor, top_p: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of sorted probabilities [N, any]: the least that stays [N, 1], how often [N, 1], and whether all stay [N]."""
    mass_before = descending.cumsum(-1) - descending
    kept_N1 = (mass_before < top_p).sum(-1, keepdim=True)
    least_N1 = descending.gather(-1, kept_N1 - 1)
    all_kept_N = kept_N1[:, 0] == descending.shape[-1]
    return least_N1, kept_N1 - (descending > least_N1).sum(-1, keepdim=True), all_kept_N


def draw(probs_V: Tensor, *, generator: torch.Generator) -> Tensor:
    """One token id [1] from the law [V], by its inverse distribution function: one random number, no wait.

    `torch.multinomial` checks its input on the host and takes many times as long over a large vocabulary.
    """
    sums_V = probs_V.double().cumsum(-1)
    threshold_1 = torch.rand(1, generator=generator, dtype=torch.float64, device=probs_V.device) * sums_V[-1:]
    token_1 = torch.searchsorted(sums_V, threshold_1, right=True)  # right: never a token of probability 0
    return token_1.clamp(max=len(probs_V) - 1)  # where the law is not finite
