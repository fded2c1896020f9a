"""Intervals of figures of examples: how far that of all examples like them may be. Tested by test_intervals.py."""

import math

Interval = tuple[float, float]

# Student's t, two-sided at 95 %, from 1 degree of freedom on. More degrees than listed use the last value.
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09)
_Z = 1.959964  # the same for infinitely many degrees


def student_t(count: int) -> float:
    """Return by how many standard errors the mean of `count` values, at least 2, may be off at 95 %."""
    return _T[min(count - 1, len(_T)) - 1]


def share_interval(share: float, count: int) -> Interval:
    """Return the 95 % interval of a share among `count` examples, at least 1, within 0..1.

    Wilson's score interval, which says also of 0 of 10 that it may be 28 % of all. Examples that are partly right vary
    less than those that are right or wrong, so that it is too wide for them and never too narrow.
    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference" (1927).
    """
    squares = _Z**2 / count
    middle = (share + squares / 2) / (1 + squares)
    half = _Z / (1 + squares) * math.sqrt(share * (1 - share) / count + squares / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)
