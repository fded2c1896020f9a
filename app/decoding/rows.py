"""One sequence of a batch while it is decoded.

Shape legend: `B` sequences, `T` new tokens, `S` tokens so far, `C` capacity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from app.decoding.draft_policy import DraftPolicy, Pace
from app.decoding.result import DecodingResult, Step, StopReason
from app.decoding.settings import StopCondition


class GrowingIds:
    """Token ids on a device, in memory that doubles when it is full: ids that are there are not written again.

    Attributes:
        settled: How many stay; drafts after them are overwritten.
    """

    def __init__(self) -> None:
        self.settled = 0
        self._ids_C = torch.empty(0, dtype=torch.long)

    def write(self, new_T: Tensor, *, num_drafted: int) -> Tensor:
        """Put T ids after the settled ones, the last `num_drafted` of them as drafts; a view of all ids [1, S]."""
        stop = self.settled + len(new_T)
        if stop > len(self._ids_C):
            ids_C = new_T.new_empty(2 * stop)
            ids_C[: self.settled] = self._ids_C[: self.settled]
            self._ids_C = ids_C
        self._ids_C[self.settled : stop] = new_T
        self.settled = stop - num_drafted
        return self._ids_C[None, :stop]


@dataclass(kw_only=True, eq=False)
class SequenceState:
    """What is known of a sequence, all of it on the host but `context`.

    Attributes:
        index: Place of the prompt in the request.
        prompt: Token ids, at least one.
        budget: New tokens still to come at most.
        limit_reason: Why the sequence ends when the budget is used up.
        eos_token_ids: Any of these ends it.
        stop: A further end.
        policy: How much to draft.
        pace: Whether drafting still pays.
        generator: Source of this sequence's randomness, so that a batch changes nothing; None when greedy.
        context: Its token ids where processors of scores want them; empty unless there are any.
    """

    index: int
    prompt: list[int]
    budget: int
    limit_reason: StopReason
    eos_token_ids: frozenset[int]
    stop: StopCondition | None
    policy: DraftPolicy
    pace: Pace
    generator: torch.Generator | None
    context: GrowingIds = field(default_factory=GrowingIds)
    tokens: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    stop_reason: StopReason | None = None
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    fell_back_after: int | None = None

    @property
    def length(self) -> int:
        """Positions that every block has seen: everything settled but the latest token."""
        return len(self.prompt) + len(self.tokens) - 1

    @property
    def remaining(self) -> int:
        """New tokens that still fit."""
        return self.budget - len(self.tokens)

    def draft_limit(self) -> int:
        """Most tokens worth drafting now: a round settles one more than it drafts."""
        return min(self.policy.limit(), self.remaining - 1)

    def new_ids(self, drafted: Sequence[int]) -> list[int]:
        """What `context` lacks: prompt and settled tokens that it has not seen, then what was drafted."""
        settled = self.context.settled
        return [*self.prompt[settled:], *self.tokens[max(settled - len(self.prompt), 0) :], *drafted]

    def settle(self, step: Step, *, at: float) -> Step:
        """Take a round's tokens up to the earliest end of the sequence, at time `at`; the part that was taken."""
        before = len(self.tokens)
        self.tokens += step.tokens
        keep = len(self.tokens)
        ends = [before + i + 1 for i, token in enumerate(step.tokens) if token in self.eos_token_ids]
        if ends:
            keep, self.stop_reason = ends[0], "eos"
        if self.stop is not None and (stopped := self.stop(self.prompt, self.tokens[:keep], keep - before)) is not None:
            keep, self.stop_reason = stopped, "stop"
        del self.tokens[keep:]
        if self.stop_reason is None and not self.remaining:
            self.stop_reason = self.limit_reason
        if before:
            self.steps.append(step)
        else:
            self.first_token_at = at
        self.last_token_at = at
        taken = step.tokens[: keep - before]
        return Step(taken, min(step.accepted, len(taken)), step.rejected if len(taken) == len(step.tokens) else ())

    def result(self, *, started_at: float) -> DecodingResult:
        """What came of it; a sequence that was not finished was interrupted."""
        return DecodingResult(
            tokens=self.tokens,
            stop_reason=self.stop_reason or "interrupted",
            seconds_prefill=max(self.first_token_at - started_at, 0.0),
            seconds_decode=self.last_token_at - self.first_token_at,
            steps=tuple(self.steps),
            fell_back_after=self.fell_back_after,
        )


def contexts(rows: Sequence[SequenceState], drafts: Sequence[Sequence[int]], *, device: torch.device) -> list[Tensor]:
    """Of each row all token ids [1, S], drafts included; what is new goes to the device in one transfer for all."""
    new = [row.new_ids(drafted) for row, drafted in zip(rows, drafts, strict=True)]
    parts = torch.tensor(list(chain.from_iterable(new)), device=device).split_with_sizes([len(ids) for ids in new])
    return [
        row.context.write(part, num_drafted=len(drafted))
        for row, part, drafted in zip(rows, parts, drafts, strict=True)
    ]
