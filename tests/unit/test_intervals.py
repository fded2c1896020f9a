"""Intervals against published values."""

import pytest

from app.intervals import share_interval, student_t


@pytest.mark.parametrize(
    ("right", "count", "interval"),
    [
        (81, 263, (0.2553, 0.3662)),  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_a_share_has_wilsons_interval(right, count, interval):
    assert share_interval(right / count, count) == pytest.approx(interval, abs=5e-5)
    mirrored = share_interval(1 - right / count, count)
    assert mirrored == pytest.approx((1 - interval[1], 1 - interval[0]), abs=5e-5)


def test_no_share_is_below_nothing_or_above_everything():
    assert all(0.0 <= end <= 1.0 for count in range(1, 99) for share in (0, 1) for end in share_interval(share, count))


def test_students_t_counts_values_from_two_on():
    assert [student_t(count) for count in (2, 3, 20, 10_000)] == [12.71, 4.30, 2.09, 2.09]
