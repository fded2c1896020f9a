"""A whole round as one fixed sequence of kernels over buffers that never move, captured as a graph on a CUDA device.

Shape legend: `B` sequences, `T` drafted tokens, `S` = T + 1 verified positions, `D` most drafts, `V` vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from app.decoding.draft_policy import CONFIDENCE_BINS
from app.decoding.drafters import FullModel
from app.decoding.fixed_sequence import FixedSequence
from app.decoding.static_rules import StaticGreedyRule, StaticSamplingRule
from app.protocols import StaticDecoderCache

# Columns of `given_BG`: most drafts, or -1 where the row has ended; the least chance; the chances.
_LIMIT, _LEAST, _CHANCES = 0, 1, 2


class StaticProgram:
    """What the device does in a prefill and in a round, without asking the host.

    Attributes:
        given_BG: What the host writes before a round: each row's limit and the chances of its policy.
        ends_BN: Ids that end each row's text, filled up with -1.
        outcome_BO: What the host reads after a round, in float64, which holds any id: D drafts, their confidences, how
            many were drafted and how many kept, the full model's token after them, and whether its scores were finite.
        num_rows: Rows that the next rounds are over; later ones of the buffers are not used.
    """

    def __init__(
        self,
        drafter: FullModel,
        cache: StaticDecoderCache,
        rule: StaticGreedyRule | StaticSamplingRule,
        *,
        most_drafts: int,
        most_ends: int,
        compiled: bool = False,
    ) -> None:
        batch, device = len(cache.lengths_B), cache.lengths_B.device
        self.drafter, self.cache, self.rule, self._most = drafter, cache, rule, most_drafts
        self.num_rows, self._compiled = batch, compiled
        self._tokens_BS = torch.zeros(batch, most_drafts + 1, dtype=torch.long, device=device)
        self.given_BG = torch.zeros(batch, _CHANCES + CONFIDENCE_BINS, dtype=torch.float64, device=device)
        self.outcome_BO = torch.zeros(batch, 2 * most_drafts + 4, dtype=torch.float64, device=device)
        self.ends_BN = torch.zeros(batch, max(1, most_ends), dtype=torch.long, device=device)
        self._sequences: dict[tuple[int, int], FixedSequence] = {}

    def prefill(self, tokens_BT: Tensor, lengths: Sequence[int]) -> Tensor:
        """Begin with prompts, padded to one length; return the outcome, whose token is each row's first new one."""
        self.cache.clear()
        self.num_rows = len(lengths)
        logits_B1V = self.drafter.prefill(tokens_BT, lengths)
        self.cache.lengths_B.copy_(torch.tensor(lengths))
        nothing_B = torch.zeros_like(self.cache.lengths_B)
        verdict = self.rule.verify(logits_B1V, self._tokens_BS[:, :0], nothing_B, self.cache.lengths_B - 1)
        self._tokens_BS[:, 0] = verdict.token_B
        self.outcome_BO[:, -4:] = torch.stack((nothing_B, nothing_B, verdict.token_B, verdict.finite_B), dim=1)
        return self.outcome_BO

    def round(self, num_drafts: int) -> Tensor:
        """Draft so many tokens at most, verify and settle them; return the outcome."""
        key = self.num_rows, num_drafts
        if key not in self._sequences:
            device = self.cache.lengths_B.device
            self._sequences[key] = FixedSequence(lambda: self._round(num_drafts), device, compiled=self._compiled)
        self._sequences[key]()
        return self.outcome_BO[: self.num_rows]

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Move these rows to the front, and go on with so many."""
        index = torch.tensor(rows, device=self._tokens_BS.device)
        buffers = [self._tokens_BS, self.ends_BN]
        if isinstance(self.rule, StaticSamplingRule):
            buffers.append(self.rule.seeds_B)
        for buffer in buffers:
            buffer[: len(rows)] = buffer.index_select(0, index)
        self.drafter.keep_rows(rows)
        self.num_rows = len(rows)

    def grow(self, capacity: int) -> None:
        """Make room for so many positions; every sequence is captured anew."""
        self.cache.grow(capacity)
        self._sequences.clear()

    def _round(self, num_drafts: int) -> None:
        self.cache.begin_round()
        rows = slice(0, self.num_rows)
        tokens_BS, given_BG, ends_BN = self._tokens_BS[rows], self.given_BG[rows], self.ends_BN[rows]
        start_B, outcome_BO = self.cache.lengths_B[rows], self.outcome_BO[rows]
        limit_B, chances_BK = given_BG[:, _LIMIT], given_BG[:, _CHANCES:]
        goes_on_B = limit_B >= 0
        start_B *= goes_on_B  # a row that has ended begins anew, or it would go on into the memory of the next row
        live_B, chance_B, drafted_B = limit_B > 0, torch.ones_like(limit_B), torch.zeros_like(start_B)
        for i in range(num_drafts):
            # A row that no longer drafts is computed on, and what it drafts is not counted.
            logits_BV = self.drafter.draft(tokens_BS[:, i])
            token_B, confidence_B = self.rule.draft(logits_BV, start_B + i)
            tokens_BS[:, i + 1] = token_B
            outcome_BO[:, self._most + i] = confidence_B
            drafted_B = drafted_B + live_B
            bin_B1 = (confidence_B * CONFIDENCE_BINS).long().clamp(0, CONFIDENCE_BINS - 1)[:, None]
            chance_B = chance_B * chances_BK.gather(1, bin_B1)[:, 0]
            ended_B = (token_B[:, None] == ends_BN).any(-1)
            live_B = live_B & (i + 1 < limit_B) & ~ended_B & (chance_B >= given_BG[:, _LEAST])
        drafts_BT = tokens_BS[:, 1 : num_drafts + 1]
        logits_BSV = self.drafter.verify(tokens_BS[:, : num_drafts + 1])
        self.drafter.complete()
        kept_B, token_B, finite_B = self.rule.verify(logits_BSV, drafts_BT, drafted_B, start_B)
        outcome_BO[:, :num_drafts] = drafts_BT
        outcome_BO[:, -4:] = torch.stack((drafted_B, kept_B, token_B, finite_B), dim=1)
        tokens_BS[:, 0] = token_B.where(goes_on_B, tokens_BS[:, 0])
        start_B += (kept_B + 1) * goes_on_B
