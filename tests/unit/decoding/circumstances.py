"""What decoding may meet on its way, chosen by the test: clocks, ends of sequences."""

from collections.abc import Iterable, Sequence
from itertools import cycle

from app.decoding.settings import StopCondition


class HostileClock:
    """Stands for time.perf_counter: between two looks at it pass the given seconds in turn."""

    def __init__(self, ticks: Iterable[float]) -> None:
        self._ticks, self._now = cycle(ticks), 0.0

    def __call__(self) -> float:
        self._now += next(self._ticks)
        return self._now


def ends_after(pattern: Sequence[int]) -> StopCondition:
    """Ends a sequence with the first occurrence of the pattern, which may have begun in an earlier round."""

    def stop(_: Sequence[int], tokens: Sequence[int], num_new: int) -> int | None:
        ends = range(len(tokens) - num_new + 1, len(tokens) + 1)
        return next((end for end in ends if list(tokens[:end][-len(pattern) :]) == list(pattern)), None)

    return stop
