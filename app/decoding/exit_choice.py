"""Which of several exits drafts in a round. Tested by tests/unit/decoding/test_exit_choice.py."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log, sqrt

from app.decoding.cost_model import CostModel

_FIRST_ROUNDS = 4  # of each exit, before any is preferred
_MEMORY = 128  # rounds after which what an exit did counts for little (1/e)
_CURIOSITY = 0.3  # share by which an exit that was hardly tried is taken to be faster than it showed
_HICCUP = 3.0  # times an exit's mean; what a round takes beyond that is the machine's doing


@dataclass
class _Record:
    """What the rounds of an exit were like, later ones weighing more."""

    rounds: float = 0.0
    settled: float = 0.0
    cost: float = 0.0


class ExitChoice:
    """Prefers the exit whose rounds settled the most tokens for their cost, and tries the others from time to time.

    An exit counts as faster than it showed by a share that grows while it is not tried (discounted upper confidence
    bounds, Garivier and Moulines 2011). Nothing but counts and costs decides. Greedy rounds cost what the clock says.
    Sampled ones cost what the cost model says, so that a seed gives the same text whatever the machine is doing.

    Args:
        costs: The cost model of drafting from each exit, in the order in which they are tried.
        by_clock: Whether the clock tells what a round costs.

    Attributes:
        exit_layer: The exit that drafts now.
    """

    def __init__(self, costs: Mapping[int, CostModel], *, by_clock: bool) -> None:
        self._costs, self._by_clock = costs, by_clock
        self._records = {exit_layer: _Record() for exit_layer in costs}
        self.exit_layer = next(iter(costs))

    @property
    def costs(self) -> CostModel:
        """The costs of drafting from this exit."""
        return self._costs[self.exit_layer]

    def begin_round(self) -> int:
        """Choose the exit of a round by the rounds before; asking again changes nothing."""
        self.exit_layer = max(self._records, key=lambda exit_layer: self._promise(self._records[exit_layer]))
        return self.exit_layer

    def observe(self, *, drafted: int, settled: int, seconds: float) -> None:
        """Add a round of this exit."""
        own, cost = self._records[self.exit_layer], seconds
        if not self._by_clock:
            cost = self.costs.round_cost(drafted)
        elif own.rounds:
            cost = min(cost, _HICCUP * own.cost / own.rounds)
        for record in self._records.values():
            record.rounds *= 1.0 - 1.0 / _MEMORY
            record.settled *= 1.0 - 1.0 / _MEMORY
            record.cost *= 1.0 - 1.0 / _MEMORY
        own.rounds += 1.0
        own.settled += settled
        own.cost += cost

    def _promise(self, record: _Record) -> float:
        """Tokens for their cost, and more of them the less is known; without bounds for an exit that is new."""
        if record.rounds <= _FIRST_ROUNDS - 1 or not record.cost:
            return float("inf")
        total = sum(each.rounds for each in self._records.values())
        return record.settled / record.cost * (1.0 + _CURIOSITY * sqrt(log(total) / record.rounds))
