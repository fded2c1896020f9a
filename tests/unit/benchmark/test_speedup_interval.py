import numpy as np
import pytest

from app.benchmark.speedup_interval import PairedTimes, speedup_interval


def test_the_interval_is_students_over_the_prompts_on_the_logarithm() -> None:
    own, baseline = np.array([1.0, 2.0, 3.0]), np.array([2.0, 3.0, 7.0])
    found = speedup_interval(2.0, PairedTimes.of(own.tolist(), baseline.tolist()))
    differences = baseline / 12 - own / 6
    error = np.sqrt(3 / 2 * (differences**2).sum())
    assert found == pytest.approx((2 * np.exp(-4.30 * error), 2 * np.exp(4.30 * error)))
    assert speedup_interval(2.0, PairedTimes.of([1.0, 2.0], [2.0, 4.0])) == pytest.approx((2.0, 2.0))
    assert speedup_interval(2.0, PairedTimes.of([1.0], [2.0])) is None
    assert speedup_interval(None, PairedTimes.of([0.0, 0.0], [0.0, 0.0])) is None


def test_it_covers_the_ratio_of_the_means_about_19_times_in_20() -> None:
    random, covered = np.random.default_rng(0), 0
    for _ in range(1000):
        baseline = random.lognormal(sigma=0.3, size=8)
        own = baseline / random.uniform(1.0, 2.0, size=8)  # the ratio of the means is 1 / ln 2
        interval = speedup_interval(baseline.sum() / own.sum(), PairedTimes.of(own.tolist(), baseline.tolist()))
        assert interval is not None
        covered += interval[0] <= 1 / np.log(2) <= interval[1]
    assert 900 <= covered <= 960
