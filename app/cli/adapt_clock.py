"""How `layerskip adapt` shares out its hours. Tested by tests/unit/cli/test_adapt_clock.py."""

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

from app import metric_names
from app.whole_file import write_whole

# Shares of the hours, in the order of the steps. An export takes seconds.
_SHARES = {"write": 0.27, "cache": 0.09, "train": 0.44, "export": 0.0, "tune": 0.1, "benchmark": 0.1}
_LEAST = 0.5  # of its share, which a step has in any case: with less, what came before would be for nothing


@dataclass(frozen=True)
class AdaptClock:
    """Counts the time of each step over all calls of a command, in files of its folder.

    Of a step in which the whole command was killed, only the attempts before and after count.

    Args:
        folder: Where marks of the steps are kept.
        seconds: Time to spend on all steps together.
        now: Tells the time in seconds.
    """

    folder: Path
    seconds: float
    now: Callable[[], float] = perf_counter

    def time_for(self, step: str) -> float:
        """Return the seconds that a step may take from here on.

        Where earlier steps took longer than their shares, the steps from this one on divide what they left. Where they
        took less, training has what is left over.
        """
        share, took = _SHARES[step] * self.seconds, self.took()
        steps = [*_SHARES]
        left = self.seconds - sum(seconds for name, seconds in took.items() if name != step)
        of_left = left * _SHARES[step] / sum(_SHARES[name] for name in steps[steps.index(step) :])
        most = of_left if step == "train" else min(share, of_left)
        return max(_LEAST * share, most - took.get(step, 0.0))

    def took(self) -> dict[str, float]:
        """Return the seconds of each step that was begun, in the order of the steps."""
        marks = {
            step: self._mark(step, "done") if self.is_done(step) else self._mark(step, "tried") for step in _SHARES
        }
        return {step: json.loads(mark.read_text())["seconds"] for step, mark in marks.items() if mark.exists()}

    def is_done(self, step: str) -> bool:
        """Whether a step ended well."""
        return self._mark(step, "done").exists()

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Count the time of a step, which is done unless an exception ends it."""
        started, before, end = self.now(), self.took().get(step, 0.0), "tried"
        try:
            yield
            end = "done"
        finally:
            write_whole(self._mark(step, end), json.dumps({"seconds": before + self.now() - started}))

    def _mark(self, step: str, end: str) -> Path:
        return self.folder / f"{step}.{end}"


def in_minutes(seconds: float) -> str:
    """Write a time in minutes, with a decimal below ten."""
    return f"{seconds / 60:.0f}" if seconds >= 595 else f"{seconds / 60:.1f}"


def probed_speed(file: Path) -> tuple[float, float]:
    """Return tokens a second and tokens a step, medians of what a short run logged into a file of CSVLogger."""
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    speed, tokens_a_step = (
        median(float(row[name]) for row in rows if row.get(name))
        for name in (metric_names.TOKENS_PER_SECOND, metric_names.TRAIN_LABEL_TOKENS)
    )
    return speed, tokens_a_step
