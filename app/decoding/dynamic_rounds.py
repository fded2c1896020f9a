"""Rounds of draft and verify that look at every draft on the host before the next one.

Shape legend: `B` sequences, `T` prompt tokens, `S` verified positions (drafts + 1).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from app.decoding.acceptance import ChoiceRule
from app.decoding.draft_policy import Pace
from app.decoding.drafters import FullModel
from app.decoding.result import Step
from app.decoding.rows import SequenceState


class Round(NamedTuple):
    """What a round found for each row, when it ended by the engine's clock, and how long its two parts took."""

    steps: list[Step]
    ended_at: float
    draft_seconds: float
    verify_seconds: float


class DynamicRounds(NamedTuple):
    """A prefill, then rounds of draft and verify."""

    drafter: FullModel
    rule: ChoiceRule
    clock: Callable[[], float]

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Go on with these sequences only."""
        self.drafter.keep_rows(rows)

    @property
    def takes_rows(self) -> bool:
        """Whether further sequences can join."""
        return self.drafter.takes_rows

    def join(self, other: "DynamicRounds") -> None:
        """Between rounds, take over the sequences of another one of this strategy after its prefill."""
        self.drafter.join(other.drafter)

    def end_drafting(self) -> None:
        """Drop what only drafts need, since none is to come any more."""
        self.drafter.end_drafting()

    def end(self) -> None:
        """No round comes any more."""

    def prefill(self, rows: Sequence[SequenceState]) -> Round:
        """Run all prompts through the model, padded to one length; each yields its first new token."""
        lengths = [len(row.prompt) for row in rows]
        padded = [row.prompt + [0] * (max(lengths) - len(row.prompt)) for row in rows]
        tokens_BT = torch.tensor(padded, device=self.drafter.decoder.device)
        nothing: list[list[int]] = [[] for _ in rows]
        chosen = self.rule.verify(self.drafter.prefill(tokens_BT, lengths), rows, nothing, tokens_BT)
        return Round([Step([token]) for _, token in chosen], self.clock(), 0.0, 0.0)

    def round(self, rows: Sequence[SequenceState]) -> Round:
        """Draft for every row until none wants more, then verify all at once.

        A row's drafts are what followed its latest tokens where they occurred before, else the drafter's. Rows that
        draft less than others are padded with tokens that are neither verified nor kept.
        """
        started_at = self.clock()
        is_plain = any(pace.wants_plain_round() for pace in paces_of(rows))
        drafts = [[] if is_plain else row.n_gram_draft() for row in rows]
        by_n_gram = [bool(found) for found in drafts]
        limits = [0 if is_plain or found else row.draft_limit() for row, found in zip(rows, drafts, strict=True)]
        live = [limit > 0 for limit in limits]
        found_BS = self._latest_and_found(rows, drafts)
        columns = [found_BS[:, 0]]
        exits: list[list[int]] = [[] for _ in rows]
        while any(live):
            chosen = [row.choice.exit_layer if row.choice and on else None for row, on in zip(rows, live, strict=True)]
            drafted = self.rule.draft(self.drafter.draft(columns[-1], chosen), rows, drafts, live)
            tokens_B = drafted.tokens_B
            if len(columns) < found_BS.shape[1]:
                found_B = found_BS[:, len(columns)]
                tokens_B = found_B.where(found_B >= 0, tokens_B)
            columns.append(tokens_B)
            for i, row in enumerate(rows):
                if live[i]:
                    drafts[i].append(drafted.tokens[i])
                    if (exit_layer := chosen[i]) is not None:
                        exits[i].append(exit_layer)
                    live[i] = (
                        len(drafts[i]) < limits[i]
                        and drafts[i][-1] not in row.settings.eos_token_ids  # nothing comes after the end
                        and row.policy.goes_on(drafted.confidences[i] if drafted.confidences else 1.0)
                    )
        tokens_BS = torch.cat([torch.stack(columns, dim=1), found_BS[:, len(columns) :].clamp(min=0)], dim=1)
        drafted_at = self.clock()
        outcomes = self.rule.verify(self.drafter.verify(tokens_BS), rows, drafts, tokens_BS)
        self.drafter.settle([row.length + 1 + kept for row, (kept, _) in zip(rows, outcomes, strict=True)])
        ended_at = self.clock()
        steps = [
            Step([*proposed[:kept], token], kept, tuple(proposed[kept:]), found, tuple(drafted_from))
            for proposed, found, drafted_from, (kept, token) in zip(drafts, by_n_gram, exits, outcomes, strict=True)
        ]
        for row, step in zip(rows, steps, strict=True):
            if not step.by_n_gram:
                row.learn(step, seconds=ended_at - started_at)
        return Round(steps, ended_at, drafted_at - started_at, ended_at - drafted_at)

    def _latest_and_found(self, rows: Sequence[SequenceState], found: Sequence[Sequence[int]]) -> Tensor:
        """Each row's latest token and what n-grams drafted after it [B, S], in one transfer; -1 where that ends."""
        longest = max(map(len, found))
        tokens = [[row.tokens[-1], *own, *[-1] * (longest - len(own))] for row, own in zip(rows, found, strict=True)]
        return torch.tensor(tokens, device=self.drafter.decoder.device)


def paces_of(rows: Sequence[SequenceState]) -> list[Pace]:
    """Who judges the drafts of these rows, each once."""
    return list(dict.fromkeys(pace for row in rows for pace in (row.pace, row.n_gram_pace)))
