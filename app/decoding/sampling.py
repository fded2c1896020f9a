"""From logits to the distribution a token is drawn from.

Shape legend: `N` distributions, `S` tokens so far, `V` vocabulary; `...` any leading dimensions.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from app.errors import ConfigError, check_range

_log = logging.getLogger(__name__)
_CANDIDATES = 1024  # most probable tokens to look for first: they nearly always hold top_p, and save sorting all

# Takes the token ids of one sequence so far [1, S] and the scores of the next token [1, V], and returns new scores
# [1, V]. Any transformers LogitsProcessor or LogitsProcessorList fits if its result depends on these two alone and
# leaves some token possible. It must not change the ids, which later rounds use, too.
LogitsProcessor = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How a token is chosen; the default is greedy.

    Attributes:
        temperature: Divides the logits, at least 0. At 0 decoding is greedy: it takes the most probable token.
        top_k: Keep the k most probable tokens, at least 1; None keeps all.
        top_p: Then keep the smallest set of most probable tokens that holds this share, in (0, 1]; 1 keeps all.
        min_p: Then keep the tokens at least this share as probable as the most probable one, in [0, 1]; 0 keeps all.
        processor: Applied first of all to the scores of every token, drafted or verified, greedy or not.
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
        return self.temperature == 0.0


def probabilities(logits: Tensor, *, settings: SamplingSettings) -> Tensor:
    """The distribution a token is drawn from: temperature, then top-k, then top-p, then min-p, renormalised.

    Args:
        logits: Scores [..., V].
        settings: With a temperature above 0.

    Returns:
        Probabilities [..., V], at least float32. Tokens as probable as the last one of top-k are all kept.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    # Subtracting the maximum first makes the best token certain at a tiny temperature, where a quotient would overflow.
    temperature = max(settings.temperature, torch.finfo(logits.dtype).tiny)
    probs = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if settings.top_k is not None and settings.top_k < probs.shape[-1]:
        kth = probs.topk(settings.top_k).values[..., -1:]
        probs = probs.where(probs >= kth, 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    if settings.top_p < 1.0:
        few = min(_CANDIDATES, (settings.top_k or _CANDIDATES) + 1)  # the one more is 0, unless there are ties
        probs = _most_probable(probs.reshape(-1, probs.shape[-1]), top_p=settings.top_p, few=few).view_as(probs)
        probs = probs / probs.sum(-1, keepdim=True)
    if settings.min_p > 0.0:
        probs = probs.where(probs >= settings.min_p * probs.amax(-1, keepdim=True), 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def _most_probable(probs_NV: Tensor, *, top_p: float, few: int) -> Tensor:
    """Top-p before renormalising: a token stays if the more probable ones, and equal ones of lower id, hold less.

    On a CPU the `few` most probable tokens are tried first, and only the distributions of which they hold too little
    are sorted as a whole. On another device that question would make the host wait, so all are sorted.
    """
    all_sorted = probs_NV.device.type != "cpu" or probs_NV.shape[-1] <= _CANDIDATES
    descending = probs_NV.sort(-1, descending=True).values if all_sorted else probs_NV.topk(few).values
    least_N1, ties_N1, too_few_N = _edge(descending, top_p)
    if not all_sorted and too_few_N.any():
        whole = probs_NV[too_few_N].sort(-1, descending=True).values
        least_N1[too_few_N], ties_N1[too_few_N], _ = _edge(whole, top_p)
    number_NV = (probs_NV == least_N1).cumsum(-1, dtype=torch.int32)  # counts tied tokens, from 1 on
    return probs_NV.where((probs_NV > least_N1) | (probs_NV == least_N1) & (number_NV <= ties_N1), 0.0)


def _edge(descending: Tensor, top_p: float) -> tuple[Tensor, Tensor, Tensor]:
    """The least of the sorted probabilities that stays [N, 1], how many equal ones stay [N, 1], and if all do [N]."""
    mass_before = descending.cumsum(-1) - descending
    kept_N1 = (mass_before < top_p).sum(-1, keepdim=True)
    least_N1 = descending.gather(-1, kept_N1 - 1)
    all_kept_N = kept_N1[:, 0] == descending.shape[-1]
    return least_N1, kept_N1 - (descending > least_N1).sum(-1, keepdim=True), all_kept_N


def over_vocabulary(values: Tensor, ids: Tensor | None, vocab_size: int, *, outside: float = float("-inf")) -> Tensor:
    """Values [..., V'] of these token ids [V'] among all [..., V], the others being `outside`; None stands for all."""
    if ids is None:
        return values
    return values.new_full((*values.shape[:-1], vocab_size), outside).index_copy_(-1, ids, values)


def draw(probs_V: Tensor, *, generator: torch.Generator) -> Tensor:
    """Draw a token id [1] by the inverse of the distribution function, from one random number and without a wait.

    `torch.multinomial` checks its input on the host and takes many times as long over a large vocabulary.
    """
    sums_V = probs_V.double().cumsum(-1)
    threshold_1 = torch.rand(1, generator=generator, dtype=torch.float64, device=probs_V.device) * sums_V[-1:]
    token_1 = torch.searchsorted(sums_V, threshold_1, right=True)  # right: never a token of probability 0
    return token_1.clamp(max=len(probs_V) - 1)  # searchsorted points beyond the end if the sums are NaN
