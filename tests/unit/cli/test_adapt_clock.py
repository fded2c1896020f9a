"""The hours of an adaptation, shared out over its steps by a clock that the test moves."""

import pytest

from app.cli.adapt_clock import _SHARES, AdaptClock, in_minutes

SHARES = {step: 1000 * share for step, share in _SHARES.items()}  # of 1,000 seconds


@pytest.fixture
def spend(tmp_path):
    """Gives a clock of 1,000 seconds and a function that lets a step take some of them."""
    time = [0.0]
    clock = AdaptClock(tmp_path, 1000.0, now=lambda: time[0])

    def take(step, seconds, *, error=None):
        with clock.timed(step):
            time[0] += seconds
            if error is not None:
                raise error

    return clock, take


def test_the_shares_are_the_whole_time():
    assert sum(_SHARES.values()) == pytest.approx(1.0)


def test_steps_that_keep_to_their_shares_leave_the_others_theirs(spend):
    clock, take = spend
    for step in ("write", "cache", "train", "tune"):
        assert clock.time_for(step) == pytest.approx(SHARES[step])
        take(step, SHARES[step])
    assert clock.time_for("benchmark") == pytest.approx(SHARES["benchmark"])


def test_steps_after_one_that_ran_over_divide_what_is_left(spend):
    clock, take = spend
    take("write", SHARES["write"])
    take("cache", SHARES["cache"] + 200)
    left = 1000 - SHARES["write"] - SHARES["cache"] - 200
    of_left = left / (SHARES["train"] + SHARES["tune"] + SHARES["benchmark"])
    assert clock.time_for("train") == pytest.approx(of_left * SHARES["train"])
    take("train", of_left * SHARES["train"])
    for step in ("tune", "benchmark"):
        assert clock.time_for(step) == pytest.approx(of_left * SHARES[step])
        take(step, of_left * SHARES[step])
    assert sum(clock.took().values()) == pytest.approx(1000)


def test_every_step_has_half_its_share_however_little_is_left(spend):
    clock, take = spend
    take("write", 5000)
    assert [clock.time_for(step) for step in ("train", "benchmark")] == [SHARES["train"] / 2, SHARES["benchmark"] / 2]


def test_training_has_what_earlier_steps_did_not_take_and_later_ones_do_not(spend):
    clock, take = spend
    take("write", 10)
    take("cache", 10)
    assert clock.time_for("train") > SHARES["train"] + 200
    take("train", 10)
    assert clock.time_for("tune") == SHARES["tune"]


def test_attempts_that_failed_count_and_a_step_that_is_done_has_them_in_its_time(spend):
    clock, take = spend
    with pytest.raises(KeyboardInterrupt):
        take("write", 100, error=KeyboardInterrupt())
    assert not clock.is_done("write")
    assert clock.time_for("write") == pytest.approx(SHARES["write"] - 100)
    take("write", 50)
    take("export", 1)
    assert clock.is_done("write")
    assert clock.took() == {"write": 150.0, "export": 1.0}


def test_minutes_are_written_in_few_digits():
    assert [in_minutes(seconds) for seconds in (6, 36, 594, 599, 5760)] == ["0.1", "0.6", "9.9", "10", "96"]
