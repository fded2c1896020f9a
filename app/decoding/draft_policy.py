"""How many tokens to draft in a round: one policy a sequence, chosen by name from one table."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from statistics import fmean, median
from typing import Protocol

from app.decoding.cost_model import CostModel
from app.decoding.settings import DraftPolicyName

_CONFIDENCE_BINS = 10
_PRIOR_WEIGHT = 4.0  # verified tokens that the prior, acceptance = confidence, counts for in each bin
_WINDOW = 16  # rounds that a judgement looks back on
_MIN_ROUNDS = 8  # rounds before the first judgement
_HICCUPS = 2  # slowest of those rounds that are left out
_FRESH = 64  # rounds that a timed plain round counts for
_PROBES = 3  # plain rounds timed before drafting is compared with them
_SUSPICION = 1.3  # a first estimate of the speedup below which more plain rounds are timed


class DraftPolicy(Protocol):
    """Decides for one sequence. Whatever it decides, a drafted token is verified: no decision changes the output."""

    wants_confidence: bool

    def limit(self) -> int:
        """Most tokens to draft in the round that begins."""

    def goes_on(self, confidence: float) -> bool:
        """Whether to draft another token after one that was drafted with this probability."""

    def observe(self, *, drafted: int, accepted: int) -> None:
        """How the round ended."""


class FixedPolicy:
    """Always the same number."""

    wants_confidence = False

    def __init__(self, num_draft_tokens: int, costs: CostModel) -> None:
        self._num_draft_tokens = num_draft_tokens

    def limit(self) -> int:
        """All of them."""
        return self._num_draft_tokens

    def goes_on(self, confidence: float) -> bool:
        """Yes."""
        return True

    def observe(self, *, drafted: int, accepted: int) -> None:
        """Nothing is learned."""


class OffPolicy(FixedPolicy):
    """Never drafts: plain steps through the same loop."""

    def __init__(self, num_draft_tokens: int, costs: CostModel) -> None:
        super().__init__(0, costs)


class AdaptivePolicy:
    """Stops a draft when one more token would cost more than it is likely to yield (method: cost model, break-even).

    The chance that a drafted token is accepted is estimated from the probability it was drafted with, calibrated by
    the verified tokens of this sequence: in each bin of confidence the share accepted, with a prior. Tokens after a
    rejected one were not verified and teach nothing.
    """

    wants_confidence = True

    def __init__(self, num_draft_tokens: int, costs: CostModel) -> None:
        self._most, self._costs = num_draft_tokens, costs
        centres = [(index + 0.5) / _CONFIDENCE_BINS for index in range(_CONFIDENCE_BINS)]
        self._accepted = [_PRIOR_WEIGHT * centre for centre in centres]
        self._verified = [_PRIOR_WEIGHT] * _CONFIDENCE_BINS
        self._bins: list[int] = []  # of this round's drafts
        self._product = 1.0
        self._rounds: deque[tuple[int, int]] = deque(maxlen=_WINDOW)  # drafted, settled

    def limit(self) -> int:
        """As many as are allowed; a round begins."""
        self._bins, self._product = [], 1.0
        return self._most

    def goes_on(self, confidence: float) -> bool:
        """Whether the product of the acceptance probabilities so far is above break-even."""
        self._bins.append(min(int(confidence * _CONFIDENCE_BINS), _CONFIDENCE_BINS - 1))
        self._product *= self._accepted[self._bins[-1]] / self._verified[self._bins[-1]]
        return self._product >= self._costs.break_even(self._speedup())

    def observe(self, *, drafted: int, accepted: int) -> None:
        """Learn from the accepted drafts and the first rejected one."""
        for index, bin_ in enumerate(self._bins[: min(accepted + 1, drafted)]):
            self._verified[bin_] += 1
            self._accepted[bin_] += index < accepted
        if drafted:
            self._rounds.append((drafted, accepted + 1))

    def _speedup(self) -> float:
        """Of the latest rounds by the cost model, at least 1: below that, drafting as a whole is to be given up."""
        if not self._rounds:
            return 1.0
        drafted, settled = (sum(column) / len(self._rounds) for column in zip(*self._rounds, strict=True))
        return max(1.0, self._costs.speedup(settled, drafted))


POLICIES: dict[DraftPolicyName, Callable[[int, CostModel], DraftPolicy]] = {
    "fixed": FixedPolicy,
    "adaptive": AdaptivePolicy,
    "off": OffPolicy,
}


class Pace:
    """Notices that drafting slows a request down, so that the engine can give it up.

    By the clock when greedy. A sampled output depends on where drafting ended, so there the cost model judges in the
    clock's place: the same seed gives the same tokens whatever the machine is doing.

    Args:
        costs: Of a round, for sampling.
        by_clock: Whether to measure.
    """

    def __init__(self, costs: CostModel, *, by_clock: bool) -> None:
        self._costs, self._by_clock = costs, by_clock
        self._rounds: deque[tuple[float, float, float, float]] = deque(maxlen=_WINDOW)
        self._plain: deque[tuple[int, float]] = deque(maxlen=_PROBES)  # number of the round, seconds
        self._seen = 0
        self.gave_up = False

    def drafts(self) -> bool:
        """Whether the next round may draft; if not, it is a plain one, for good or to time it."""
        if self.gave_up or not self._by_clock or len(self._rounds) < _MIN_ROUNDS:
            return not self.gave_up
        # One plain round tells where verifying is dear; several, before anything is given up on its account.
        return len(self._plain_seconds()) >= (_PROBES if self._speedup() < _SUSPICION else 1)

    def observe(self, *, drafted: float, settled: float, draft_seconds: float, verify_seconds: float) -> None:
        """A round: tokens drafted and settled, a mean over the sequences; time up to and from the last draft."""
        self._seen += 1
        if not drafted:
            self._plain.append((self._seen, draft_seconds + verify_seconds))
        else:
            self._rounds.append((drafted, settled, draft_seconds, verify_seconds))
        if len(self._rounds) >= _MIN_ROUNDS and not self.gave_up:
            sure = not self._by_clock or len(self._plain_seconds()) >= _PROBES
            self.gave_up = (self._speedup() if sure else self._bound()) < 1.0

    def _plain_seconds(self) -> list[float]:
        """Of plain rounds not long ago: steps get dearer with the context and cheaper as a batch empties."""
        return [seconds for number, seconds in self._plain if number > self._seen - _FRESH]

    def _speedup(self) -> float:
        """Of the latest rounds over plain ones; while none of those was timed, an upper bound of it."""
        if not self._by_clock:
            return self._costs.speedup(
                fmean(settled for _, settled, *_ in self._rounds), fmean(drafted for drafted, *_ in self._rounds)
            )
        plain = self._plain_seconds()
        if not plain:
            return self._bound()
        settled, draft_seconds, verify_seconds = self._undisturbed()
        return settled * median(plain) / (draft_seconds + verify_seconds)

    def _bound(self) -> float:
        """The speedup if a plain step cost as much as verifying all positions of a round does; it costs less."""
        settled, draft_seconds, verify_seconds = self._undisturbed()
        kept = len(self._rounds) - _HICCUPS
        return settled * verify_seconds / kept / (draft_seconds + verify_seconds)

    def _undisturbed(self) -> tuple[float, float, float]:
        """Sums over the latest rounds but the slowest few, tokens and all: the machine may have interrupted those."""
        kept = sorted(self._rounds, key=lambda times: times[2] + times[3])[: len(self._rounds) - _HICCUPS]
        settled, draft_seconds, verify_seconds = (sum(column) for column in list(zip(*kept, strict=True))[1:])
        return settled, draft_seconds, verify_seconds
