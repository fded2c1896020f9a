"""The two rules of `acceptance.py` as fixed sequences of kernels, for rows of any numbers of drafts at once.

Tested by tests/unit/decoding/test_static_rules.py.

Shape legend: `B` sequences, `T` drafted tokens, `S` = T + 1 verified positions, `V` vocabulary, `V'` draft vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from app.decoding.acceptance import accept_sampled
from app.decoding.sampling import SamplingSettings, over_vocabulary, probabilities

_DRAFT, _KEEP, _NEXT = range(3)  # what a random number is for


class Verdict(NamedTuple):
    """For each row how many drafts stay, the full model's token after them, and whether its scores were finite."""

    kept_B: Tensor
    token_B: Tensor
    finite_B: Tensor


class StaticGreedyRule:
    """Takes the most probable token. StaticSamplingRule has the same methods."""

    def __init__(self, draft_ids: Tensor | None, *, confidence: bool) -> None:
        self._draft_ids, self._confidence = draft_ids, confidence

    def draft(self, logits_BV: Tensor, positions_B: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the token at these positions [B]; return it and the probability with which it was drafted [B]."""
        highest_B, choices_B = logits_BV.max(-1)
        tokens_B = choices_B if self._draft_ids is None else self._draft_ids[choices_B]
        if not self._confidence:
            return tokens_B, highest_B.double()
        return tokens_B, (highest_B.float() - logits_BV.float().logsumexp(-1)).exp().double()

    def verify(self, logits_BSV: Tensor, drafts_BT: Tensor, drafted_B: Tensor, positions_B: Tensor) -> Verdict:
        """Judge the first `drafted_B` of the drafts, which begin at these positions [B]."""
        highest_BS, choices_BS = logits_BSV.max(-1)
        counts_T = torch.arange(drafts_BT.shape[1], device=drafts_BT.device)
        agrees_BT = (choices_BS[:, :-1] == drafts_BT) & (counts_T < drafted_B[:, None])
        kept_B = agrees_BT.long().cumprod(-1).sum(-1)
        counts_S = torch.arange(choices_BS.shape[1], device=drafts_BT.device)
        finite_B = (highest_BS.isfinite() | (counts_S > drafted_B[:, None])).all(-1)
        return Verdict(kept_B, choices_BS.gather(-1, kept_B[:, None])[:, 0], finite_B)


class StaticSamplingRule:
    """Draws by noise that is a pure function of a row's seed, the position and the purpose, so nothing is stored.

    A position that is drafted again has the same noise as before. What was drafted there was forgotten then, with all
    that depended on it, so the noise is new to everything that is kept.
    """

    def __init__(self, settings: SamplingSettings, draft_ids: Tensor | None, seeds_B: Tensor, vocab_size: int) -> None:
        self._settings, self._draft_ids, self._vocab_size = settings, draft_ids, vocab_size
        self.seeds_B = seeds_B  # read at each round, so that others can be written there
        self._draft_probs: list[Tensor] = []  # of this round's drafts, each [B, V']

    def draft(self, logits_BV: Tensor, positions_B: Tensor) -> tuple[Tensor, Tensor]:
        probs_BV = probabilities(logits_BV, settings=self._settings)
        self._draft_probs.append(probs_BV)
        choices_B = self._draw(probs_BV, positions_B, _DRAFT)
        confidence_B = probs_BV.gather(-1, choices_B[:, None])[:, 0].double()
        return choices_B if self._draft_ids is None else self._draft_ids[choices_B], confidence_B

    def verify(self, logits_BSV: Tensor, drafts_BT: Tensor, drafted_B: Tensor, positions_B: Tensor) -> Verdict:
        target_BSV = probabilities(logits_BSV, settings=self._settings)
        kept_B, next_BV = drafted_B, target_BSV[:, 0]
        if self._draft_probs:
            counts_T = torch.arange(drafts_BT.shape[1], device=drafts_BT.device)
            was_drafted_BT = counts_T < drafted_B[:, None]
            draft_BTV = over_vocabulary(
                torch.stack(self._draft_probs, dim=1), self._draft_ids, self._vocab_size, outside=0.0
            )
            self._draft_probs = []
            uniforms_BT = uniforms(self._seeds(drafts_BT), positions_B[:, None] + counts_T, _KEEP)
            # The position after a row's last draft is refused with nothing drafted: its residual is the target itself.
            kept_B, next_BV = torch.vmap(
                lambda drafts_T, draft_TV, target_SV, uniforms_T: accept_sampled(
                    drafts_T, draft_probs_TV=draft_TV, target_probs_SV=target_SV, uniforms_T=uniforms_T
                )
            )(
                drafts_BT,
                draft_BTV * was_drafted_BT[..., None],
                target_BSV,
                uniforms_BT.where(was_drafted_BT, float("inf")),
            )
        token_B = self._draw(next_BV, positions_B + kept_B, _NEXT)
        finite_B = next_BV.gather(-1, token_B[:, None])[:, 0].isfinite()
        return Verdict(kept_B, token_B, finite_B)

    def _seeds(self, like: Tensor) -> Tensor:
        return self.seeds_B[: len(like), None]

    def _draw(self, probs_BV: Tensor, positions_B: Tensor, purpose: int) -> Tensor:
        """Draw a token of each row: the first to come of exponential waits at rates p (the Gumbel-max trick)."""
        index_V = torch.arange(probs_BV.shape[-1], device=probs_BV.device)
        noise_BV = uniforms(self._seeds(probs_BV), positions_B[:, None], purpose, index_V)
        return (probs_BV / -torch.log1p(-noise_BV)).argmax(-1)


def uniforms(seeds: Tensor, positions: Tensor, purpose: int, index: Tensor | None = None) -> Tensor:
    """Numbers in (0, 1) of float32, a pure function of the arguments: int64 tensors, broadcast against one another."""
    row = _mixed(_mixed(seeds & 0xFFFFFFFF) ^ (seeds >> 32))
    bits = _mixed(row ^ (positions * 3 + purpose))
    if index is not None:
        bits = _mixed(bits ^ _mixed(index))
    return (bits.float() + 0.5).clamp(max=2.0**32 - 256) * 2.0**-32  # the clamp is the float32 below 2^32


def _mixed(bits: Tensor) -> Tensor:
    """Permute the 2^32 values of int64 tensors that hold 32 bits, so that each bit depends on all (hash-prospector)."""
    bits = (bits ^ (bits >> 16)) * 0x21F0AAAD & 0xFFFFFFFF
    bits = (bits ^ (bits >> 15)) * 0x735A2D97 & 0xFFFFFFFF
    return bits ^ (bits >> 15)
