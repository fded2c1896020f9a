import math

import pytest
import torch

from app.layerskip.layer_dropout import draw_kept_samples, keep_scales, keyed_generator


def draw(rates, *, batch_size=8, seed=0, step=0, micro_batch=0):
    return draw_kept_samples(rates, batch_size=batch_size, seed=seed, step=step, micro_batch=micro_batch).by_block


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_rate_zero_keeps_every_sample():
    assert same(draw([0.0, 0.0]), [torch.arange(8)] * 2)


def test_masks_depend_on_the_key_alone():
    assert same(draw([0.5] * 6), draw([0.5] * 6))
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    draw([0.5] * 6)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("key", [{"seed": 1}, {"step": 1}, {"micro_batch": 1}])
def test_every_part_of_the_key_changes_the_masks(key):
    assert not same(draw([0.5] * 6, **key), draw([0.5] * 6))


def test_keys_that_add_up_alike_do_not_collide():
    seeds = {keyed_generator(a, b, c).initial_seed() for a in range(10) for b in range(10) for c in range(10)}
    assert len(seeds) == 1000


def test_micro_batches_of_a_step_keep_equally_many_but_not_the_same_samples():
    differing = 0
    for step in range(50):
        first, second = draw([0.3] * 4, step=step, micro_batch=0), draw([0.3] * 4, step=step, micro_batch=1)
        assert [len(kept) for kept in first] == [len(kept) for kept in second]
        differing += not same(first, second)
    assert differing > 25


def test_a_smaller_micro_batch_keeps_as_many_of_its_samples_as_the_first_of_a_larger_one_do():
    rates, key = [0.2, 0.6, 0.9], {"seed": 0, "micro_batch": 0}
    differing = 0
    for step in range(100):
        large = draw_kept_samples(rates, batch_size=40, step=step, **key)
        fewer = [draw_kept_samples(rates, batch_size=size, step=step, largest_batch=40, **key) for size in (3, 2, 0)]
        assert {kept.most for kept in fewer} == {large.most} == {tuple(map(len, large.by_block))}
        three, two, none = ([len(samples) for samples in kept.by_block] for kept in fewer)
        assert all(0 <= more - less <= 1 for more, less in zip(three, two, strict=True))
        assert none == [0, 0, 0]
        assert same(fewer[0].by_block, draw(rates, batch_size=3, step=step))  # also where nobody says what others have
        differing += three != two
    assert differing > 50


def test_keep_frequency_of_every_sample_is_within_a_binomial_bound():
    rates, draws, batch_size = [0.1, 0.5, 0.9], 4000, 5
    counts = torch.zeros(len(rates), batch_size)
    for step in range(draws):
        for idx, kept in enumerate(draw(rates, batch_size=batch_size, step=step, micro_batch=step % 3)):
            counts[idx, kept] += 1
    for idx, rate in enumerate(rates):
        bound = 5 * math.sqrt(rate * (1 - rate) / draws)
        assert (counts[idx] / draws - (1 - rate)).abs().max() < bound


def test_samples_are_dropped_independently_of_one_another():
    both = sum(len(draw([0.5], batch_size=2, step=step)[0]) == 2 for step in range(4000)) / 4000
    assert both == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / 4000))


def test_mask_of_a_block_does_not_depend_on_other_blocks_rates():
    assert torch.equal(draw([0.0, 0.5])[1], draw([0.9, 0.5])[1])


def test_rescaling_is_one_by_default_and_the_inverse_keep_rate_on_request():
    assert keep_scales([0.0, 0.2], rescale=False) == (1.0, 1.0)
    assert keep_scales([0.0, 0.2], rescale=True) == pytest.approx((1.0, 1.25))
