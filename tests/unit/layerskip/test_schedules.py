import math

import pytest

from app.layerskip.schedules import (
    DEPTH_SCALES,
    TIME_SCALES,
    depth_scale,
    dropout_rates,
    needs_total_steps,
    time_scale,
)


def test_paper_depth_scale_is_zero_at_the_first_and_one_at_the_last_block():
    scales = [depth_scale(idx, num_layers=32) for idx in range(32)]
    assert scales[0] == 0.0
    assert scales[-1] == 1.0
    assert scales[16] == pytest.approx(2 ** (16 / 31) - 1)
    assert scales == sorted(scales)


def test_linear_and_uniform_depth_scales():
    assert [depth_scale(i, num_layers=5, kind="linear") for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert [depth_scale(i, num_layers=3, kind="uniform") for i in range(3)] == [1, 1, 1]


def test_time_scales_at_start_middle_and_end():
    expected = {
        "constant": (1.0, 1.0, 1.0),
        "exponential": (0.0, math.sqrt(2) - 1, 1.0),
        "linear": (0.0, 0.5, 1.0),
        "decreasing": (1.0, 0.5, 0.0),
    }
    assert expected.keys() == TIME_SCALES.keys()
    for kind, values in expected.items():
        got = [time_scale(step, total_steps=101, kind=kind) for step in (0, 50, 100)]
        assert got == pytest.approx(values), kind


def test_a_run_of_two_steps_begins_at_the_start_of_the_schedule_and_ends_at_its_end():
    assert [time_scale(step, total_steps=2, kind="exponential") for step in (0, 1)] == [0.0, 1.0]


def test_schedule_keeps_its_final_value_beyond_the_last_step():
    assert time_scale(500, total_steps=101, kind="exponential") == 1.0
    assert time_scale(500, total_steps=101, kind="decreasing") == 0.0


def test_only_the_constant_time_scale_works_without_total_steps():
    for kind in TIME_SCALES:
        if needs_total_steps(kind):
            with pytest.raises(ValueError, match=kind):
                time_scale(0, total_steps=None, kind=kind)
        else:
            assert time_scale(7, total_steps=None, kind=kind) == 1.0


def test_rates_are_the_product_of_time_depth_and_maximum():
    rates = dropout_rates(30, num_layers=4, max_dropout_rate=0.2, time="exponential", total_steps=61)
    expected = [(2 ** (30 / 60) - 1) * (2 ** (idx / 3) - 1) * 0.2 for idx in range(4)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("depth", DEPTH_SCALES)
@pytest.mark.parametrize("time", TIME_SCALES)
def test_every_combination_stays_within_zero_and_the_maximum(depth, time):
    for num_layers in (1, 2, 7):
        for step in (0, 3, 9):
            rates = dropout_rates(
                step, num_layers=num_layers, max_dropout_rate=0.3, depth=depth, time=time, total_steps=10
            )
            assert len(rates) == num_layers
            assert all(0.0 <= rate <= 0.3 for rate in rates)


@pytest.mark.parametrize(("max_dropout_rate", "saved"), [(0.1, 0.044), (0.2, 0.089)])
def test_mean_rate_over_blocks_is_the_share_of_flops_the_paper_saves(max_dropout_rate, saved):
    rates = dropout_rates(0, num_layers=32, max_dropout_rate=max_dropout_rate)
    assert sum(rates) / 32 == pytest.approx(saved, abs=5e-4)
