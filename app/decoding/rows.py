"""One sequence of a batch while it is decoded.

Shape legend: `S` tokens so far.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from app.decoding.draft_policy import DraftPolicy, Pace
from app.decoding.exit_choice import ExitChoice
from app.decoding.n_grams import NGramIndex
from app.decoding.result import DecodingResult, Step, StopReason
from app.decoding.settings import USUAL_N_GRAM_DRAFTS, DecodingSettings


@dataclass(kw_only=True, eq=False)
class SequenceState:
    """What is known of a sequence. All of it is on the host, except for `context_S`.

    Attributes:
        index: Number of the prompt in the request.
        room: Tokens that the model's context holds after the prompt.
        n_grams: The sequence as an index of what to draft from; None where n-grams do not draft.
        n_gram_pace: Judges their drafts, as `pace` judges the drafter's. Both are the same where only n-grams draft.
        choice: Chooses the exit that drafts; None where there is no choice.
        policy_by_exit: The policies of these exits, each of which becomes `policy` when its exit is chosen.
        generator: The sequence's own source of randomness, so that a batch changes nothing; None when greedy.
        context_S: Token ids on the device for processors of scores: the prompt and settled tokens they have seen.
    """

    index: int
    prompt: list[int]
    room: int
    settings: DecodingSettings
    policy: DraftPolicy
    pace: Pace
    n_grams: NGramIndex | None
    n_gram_pace: Pace
    generator: torch.Generator | None
    choice: ExitChoice | None = None
    policy_by_exit: Mapping[int, DraftPolicy] = field(default_factory=dict)
    context_S: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
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
        """New tokens that budget and context still allow."""
        return min(self.settings.max_new_tokens, self.room) - len(self.tokens)

    def n_gram_draft(self) -> list[int]:
        """What the text itself drafts now, up to the first end of the sequence; often nothing."""
        if self.n_grams is None or self.n_gram_pace.gave_up:
            return []
        most = self.settings.n_gram_max_drafts or USUAL_N_GRAM_DRAFTS
        drafted = self.n_grams.draft(min(most, self.remaining - 1))
        ends = (i + 1 for i, token in enumerate(drafted) if token in self.settings.eos_token_ids)
        return drafted[: next(ends, None)]

    def draft_limit(self) -> int:
        """Most tokens that the drafter should draft in the round that begins, which settles one more than it drafts."""
        if self.choice is not None:
            self.policy = self.policy_by_exit[self.choice.begin_round()]
        return 0 if self.pace.gave_up else min(self.policy.limit(), self.remaining - 1)

    def learn(self, step: Step, *, seconds: float) -> None:
        """Let policy and choice know how a round ended that the drafter drafted in, and how long it took."""
        self.policy.observe(drafted=step.drafted, accepted=step.accepted)
        if self.choice is not None and step.drafted:
            self.choice.observe(drafted=step.drafted, settled=step.accepted + 1, seconds=seconds)

    def new_ids(self, drafted: Sequence[int]) -> list[int]:
        """What `context_S` lacks: the later tokens of prompt and output, then what was drafted."""
        settled = len(self.context_S)
        return [*self.prompt[settled:], *self.tokens[max(settled - len(self.prompt), 0) :], *drafted]

    def settle(self, step: Step, *, at: float) -> Step:
        """Take the tokens that a round settled at time `at`, cut at the earliest end of the sequence.

        Returns:
            The part of the step that was taken.
        """
        before = len(self.tokens)
        self.tokens += step.tokens
        keep = len(self.tokens)
        ends = [before + i + 1 for i, token in enumerate(step.tokens) if token in self.settings.eos_token_ids]
        if ends:
            keep, self.stop_reason = ends[0], "eos"
        stop = self.settings.stop
        if stop is not None and (stopped := stop(self.prompt, self.tokens[:keep], keep - before)) is not None:
            keep, self.stop_reason = stopped, "stop"
        del self.tokens[keep:]
        if self.n_grams is not None:
            self.n_grams.extend(self.tokens[before:])
        self.end_without_room()
        if before:
            self.steps.append(step)
        else:
            self.first_token_at = at
        self.last_token_at = at
        taken = step.tokens[: keep - before]
        rejected = step.rejected if len(taken) == len(step.tokens) else ()
        accepted = min(step.accepted, len(taken))
        return Step(taken, accepted, rejected, step.by_n_gram, step.exits[: accepted + len(rejected)])

    def end_without_room(self) -> None:
        """End the sequence if the budget or the context is used up."""
        if self.stop_reason is None and not self.remaining:
            self.stop_reason = "max_new_tokens" if self.settings.max_new_tokens <= self.room else "context_length"

    def result(self, *, started_at: float) -> DecodingResult:
        return DecodingResult(
            tokens=self.tokens,
            stop_reason=self.stop_reason or "interrupted",
            seconds_prefill=max(self.first_token_at - started_at, 0.0),
            seconds_decode=self.last_token_at - self.first_token_at,
            steps=tuple(self.steps),
            fell_back_after=self.fell_back_after,
        )


def contexts(rows: Sequence[SequenceState], drafts: Sequence[Sequence[int]], *, device: torch.device) -> list[Tensor]:
    """All token ids [1, S] of each row, drafts included. What is new goes to the device in one transfer for all."""
    new = [row.new_ids(drafted) for row, drafted in zip(rows, drafts, strict=True)]
    flat = torch.tensor(list(chain.from_iterable(new)), dtype=torch.long, device=device)
    parts = flat.split_with_sizes([len(ids) for ids in new])
    found = []
    for row, part, drafted in zip(rows, parts, drafts, strict=True):
        ids_S = torch.cat([row.context_S.to(device), part])
        row.context_S = ids_S[: len(ids_S) - len(drafted)]
        found.append(ids_S[None])
    return found
