"""Says how far long work is. Tested by tests/unit/evaluation/test_progress.py and tests/contract/test_write.py."""

import logging
import math
from time import perf_counter

_SECONDS_A_LINE = 30.0


class TimeLeft:
    """Judges by the work that is done how long the rest will take; `seconds` is the time that it took.

    `work` is all that is to be done, in any unit, and `seconds_between` the shortest time between two answers. Work
    that is given up after `limit_seconds` takes no longer than that.
    """

    def __init__(self, work: float, *, seconds_between: float, limit_seconds: float = math.inf) -> None:
        self._left, self._between, self._limit, self._done = work, seconds_between, limit_seconds, 0.0
        self._start = self._told = perf_counter()
        self.seconds = 0.0

    def add(self, work: float) -> bool:
        """Count work that is done, and tell whether it is time for an answer."""
        self._done, self._left, self.seconds = self._done + work, self._left - work, perf_counter() - self._start
        return self._start + self.seconds - self._told >= self._between

    def in_words(self) -> str:
        """Return the time that is left, in words; some work must be done."""
        self._told = self._start + self.seconds
        seconds = min(self.seconds / self._done * self._left, max(0.0, self._limit - self.seconds))
        return f"{_in_words(seconds)} left"


class ProgressLog:
    """Logs, every half minute and at the end, what is done of the work, how fast that went, and the time left.

    Each line begins with `what`. `total` is the whole work in `unit`, a plural; `done` is what an earlier process did.
    The work is given up after `limit_seconds`.
    """

    def __init__(
        self,
        log: logging.Logger,
        what: str,
        *,
        total: int,
        unit: str,
        done: int = 0,
        limit_seconds: float = math.inf,
    ) -> None:
        self._log, self._what, self._total, self._unit, self._done = log, what, total, unit, done
        self._time_left = TimeLeft(total - done, seconds_between=_SECONDS_A_LINE, limit_seconds=limit_seconds)
        self._num_tokens = 0

    def add(self, done: int, *, num_tokens: int) -> None:
        """Count more work that is done, at least one, and the tokens in it, in which the speed is told."""
        self._done += done
        self._num_tokens += num_tokens
        if self._time_left.add(done) or self._done >= self._total:
            so_far = f"{self._what}: {self._done:,} of {self._total:,} {self._unit}"
            speed = f"{self._num_tokens / self._time_left.seconds:,.0f} tokens/s"
            self._log.info("%s, %s, %s", so_far, speed, self._time_left.in_words())


def _in_words(seconds: float) -> str:
    """`50 s`, `12 min` or `1.5 h`; seconds and minutes are rounded up."""
    if seconds < 60:
        return f"{math.ceil(seconds)} s"
    return f"{math.ceil(seconds / 60)} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
