"""How many tokens to draft in a round, and when to stop drafting for good."""

from collections import deque
from collections.abc import Callable, Sequence
from statistics import fmean, median

from app.decoding.cost_model import CostModel
from app.decoding.settings import DraftPolicyName

CONFIDENCE_BINS = 10
_PRIOR_WEIGHT = 4.0  # verified tokens that the prior, acceptance = confidence, counts for in each bin
_WINDOW = 16  # latest rounds that a judgement looks at
_MIN_ROUNDS = 8  # rounds before the first judgement
_HICCUPS = 2  # slowest rounds of the window that are left out
_FRESH = 64  # rounds for which the time of a plain round counts
_PROBES = 3  # plain rounds to time before drafting is given up because of them
_SUSPICION = 1.3  # below this first estimate of the speedup more plain rounds are timed


class DraftPolicy:
    """Drafts the same number of tokens in every round, for one sequence; subclasses adapt the number.

    The full model verifies every drafted token, so no policy changes the greedy output.
    """

    wants_confidence = False

    def __init__(self, num_draft_tokens: int, costs: CostModel) -> None:
        self._most, self._costs = num_draft_tokens, costs

    def limit(self) -> int:
        """Most tokens to draft in the round that begins."""
        return self._most

    def goes_on(self, confidence: float) -> bool:
        """Whether to draft another token after one that was drafted with the probability `confidence`."""
        return True

    def chances(self) -> tuple[Sequence[float], float]:
        """`goes_on` as numbers, for rounds that do not ask in between.

        A draft goes on while the product of its tokens' entries, by tenths of confidence, is at least the second value.
        """
        return [1.0] * CONFIDENCE_BINS, 0.0

    def observe(self, *, drafted: int, accepted: int) -> None:
        """Learn how the round ended."""


class AdaptivePolicy(DraftPolicy):
    """Stops a draft when one more token would cost more than it is likely to yield (cost model, break-even).

    The chance that a drafted token is accepted is estimated from the probability it was drafted with. The estimate is
    calibrated by the verified tokens of this sequence: each bin of confidence has the share accepted, with a prior.
    Tokens after a rejected one were not verified and teach nothing.
    """

    wants_confidence = True

    def __init__(self, num_draft_tokens: int, costs: CostModel) -> None:
        super().__init__(num_draft_tokens, costs)
        centres = [(index + 0.5) / CONFIDENCE_BINS for index in range(CONFIDENCE_BINS)]
        self._accepted = [_PRIOR_WEIGHT * centre for centre in centres]
        self._verified = [_PRIOR_WEIGHT] * CONFIDENCE_BINS
        self._bins: list[int] = []  # one for each draft of this round
        self._product = 1.0
        self._rounds: deque[tuple[int, int]] = deque(maxlen=_WINDOW)  # (drafted, settled)

    def limit(self) -> int:
        self._bins, self._product = [], 1.0
        return self._most

    def goes_on(self, confidence: float) -> bool:
        chances, least = self.chances()
        self._bins.append(min(int(confidence * CONFIDENCE_BINS), CONFIDENCE_BINS - 1))
        self._product *= chances[self._bins[-1]]
        return self._product >= least

    def chances(self) -> tuple[Sequence[float], float]:
        shares = [accepted / verified for accepted, verified in zip(self._accepted, self._verified, strict=True)]
        return shares, self._costs.break_even(self._speedup())

    def observe(self, *, drafted: int, accepted: int) -> None:
        for index, bin_ in enumerate(self._bins[: min(accepted + 1, drafted)]):
            self._verified[bin_] += 1
            self._accepted[bin_] += index < accepted
        if drafted:
            self._rounds.append((drafted, accepted + 1))

    def _speedup(self) -> float:
        """Speedup of the latest rounds by the cost model, at least 1, since `fall_back` deals with slower drafting."""
        if not self._rounds:
            return 1.0
        drafted, settled = (fmean(column) for column in zip(*self._rounds, strict=True))
        return max(1.0, self._costs.speedup(settled, drafted))


POLICIES: dict[DraftPolicyName, Callable[[int, CostModel], DraftPolicy]] = {
    "fixed": DraftPolicy,
    "adaptive": AdaptivePolicy,
    "dynamic": AdaptivePolicy,  # from each exit; ExitChoice says from which
    "off": lambda _, costs: DraftPolicy(0, costs),
}


class Pace:
    """Judges whether drafting slows a request down, so that the engine can stop it (`fall_back`).

    Greedy requests are judged by the clock. A sampled output depends on where drafting ended, so there the cost model
    judges: a seed gives the same tokens whatever the machine is doing.
    """

    def __init__(self, costs: CostModel, *, by_clock: bool) -> None:
        self._costs, self._by_clock = costs, by_clock
        # Cost by the cost model, tokens settled, and the times of drafting and verifying.
        self._rounds: deque[tuple[float, float, float, float]] = deque(maxlen=_WINDOW)
        self._plain: deque[tuple[int, float]] = deque(maxlen=_PROBES)  # (number of the round, seconds)
        self._seen = 0
        self.gave_up = False

    def wants_plain_round(self) -> bool:
        """Whether the next round is to be a plain one, whose time tells what drafting gains."""
        if self.gave_up or not self._by_clock or len(self._rounds) < _MIN_ROUNDS:
            return False
        # One plain round shows that drafting clearly pays. Before it is given up, several are timed.
        return len(self._plain_seconds()) < (_PROBES if self._speedup() < _SUSPICION else 1)

    def observe(
        self,
        *,
        drafted: float,
        settled: float,
        draft_seconds: float,
        verify_seconds: float,
        costs: CostModel | None = None,
    ) -> None:
        """Add a round.

        Args:
            drafted: Mean tokens drafted for a sequence; 0 in a plain round.
            settled: Tokens settled for each one that would have been settled without these drafts.
            draft_seconds: Time up to the last draft.
            verify_seconds: Time after it.
            costs: The costs of this round, where they are not those of all.
        """
        self._seen += 1
        if not drafted:
            self._plain.append((self._seen, draft_seconds + verify_seconds))
        else:
            cost = (costs or self._costs).round_cost(drafted)
            self._rounds.append((cost, settled, draft_seconds, verify_seconds))
        if len(self._rounds) >= _MIN_ROUNDS and not self.gave_up:
            sure = not self._by_clock or len(self._plain_seconds()) >= _PROBES
            self.gave_up = (self._speedup() if sure else self._bound()) < 1.0

    def _plain_seconds(self) -> list[float]:
        """Times of recent plain rounds; older ones say little, since contexts grow and batches empty."""
        return [seconds for number, seconds in self._plain if number > self._seen - _FRESH]

    def _speedup(self) -> float:
        """Speedup of the latest rounds over plain ones, or its upper bound while no plain round was timed."""
        if not self._by_clock:
            cost, settled, *_ = (fmean(column) for column in zip(*self._rounds, strict=True))
            return settled * self._costs.plain_step / cost
        if not (plain := self._plain_seconds()):
            return self._bound()
        settled, draft_seconds, verify_seconds = self._undisturbed()
        return settled * median(plain) / (draft_seconds + verify_seconds)

    def _bound(self) -> float:
        """The speedup if a plain step cost as much as verifying all positions of a round, which costs more."""
        settled, draft_seconds, verify_seconds = self._undisturbed()
        kept = len(self._rounds) - _HICCUPS
        return settled * verify_seconds / kept / (draft_seconds + verify_seconds)

    def _undisturbed(self) -> tuple[float, float, float]:
        """Sums over the latest rounds without the slowest ones, which the machine may have interrupted."""
        kept = sorted(self._rounds, key=lambda times: times[2] + times[3])[: len(self._rounds) - _HICCUPS]
        _, settled, draft_seconds, verify_seconds = (sum(column) for column in zip(*kept, strict=True))
        return settled, draft_seconds, verify_seconds
