"""Says how far long work is. Tested by tests/contract/test_write.py and tests/contract/test_data.py."""

import logging
from time import perf_counter

_SECONDS_A_LINE = 30.0


class ProgressLog:
    """Logs, every half minute and at the end, what is done of the work, how fast that went, and the minutes left.

    Args:
        log: Where the lines go.
        what: What the lines begin with.
        total: The whole work, in `unit`.
        unit: Plural of what the work is counted in.
        done: What an earlier process did of it.
    """

    def __init__(self, log: logging.Logger, what: str, *, total: int, unit: str, done: int = 0) -> None:
        self._log, self._what, self._total, self._unit = log, what, total, unit
        self._before = self._done = done
        self._num_tokens = 0
        self._start = self._told = perf_counter()

    def add(self, done: int, *, num_tokens: int) -> None:
        """Count more work that is done, at least one, and the tokens in it, in which the speed is told."""
        self._done += done
        self._num_tokens += num_tokens
        now = perf_counter()
        if self._done < self._total and now - self._told < _SECONDS_A_LINE:
            return
        self._told, seconds = now, now - self._start
        left = (self._total - self._done) * seconds / (self._done - self._before) / 60
        so_far = f"{self._what}: {self._done:,} of {self._total:,} {self._unit}"
        self._log.info("%s, %s tokens/s, %.1f minutes left", so_far, f"{self._num_tokens / seconds:,.0f}", left)
