import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from app.errors import DataError
from datamodules.loading.length_buckets import BucketSampler
from datamodules.loading.rank_share import RankShare

LENGTHS: npt.NDArray[np.int64] = np.random.default_rng(0).integers(5, 100, size=1000)


def sampler(
    *, step: Callable[[], int] = lambda: 0, num_rows: int = 1000, batch_size: int = 8, seed: int = 3, **share: Any
) -> BucketSampler:
    lengths = LENGTHS[:num_rows]
    return BucketSampler(lengths, batch_size=batch_size, seed=seed, share=RankShare(**share), step=step)


def train(*, steps: int, first_step: int = 0, **settings: Any) -> list[list[int]]:
    """The batches of `steps` optimizer steps, iterated epoch after epoch as Lightning does."""
    step = first_step
    accumulate = settings.get("accumulate", 1)
    batches: list[list[int]] = []
    loader = sampler(step=lambda: step, **settings)
    while step < first_step + steps:
        for micro, batch in enumerate(loader):
            if step == first_step + steps:
                break
            batches.append(batch)
            step += (micro + 1) % accumulate == 0
    return batches


@pytest.mark.parametrize("num_rows", [8, 63, 64, 65, 1000])
@pytest.mark.parametrize(("num_replicas", "accumulate"), [(1, 1), (1, 3), (2, 1), (4, 2)])
def test_every_row_comes_exactly_once_an_epoch_whatever_the_ranks(
    num_rows: int, num_replicas: int, accumulate: int
) -> None:
    ranks = [
        list(sampler(num_rows=num_rows, num_replicas=num_replicas, accumulate=accumulate, rank=rank))
        for rank in range(num_replicas)
    ]
    assert Counter(row for batches in ranks for batch in batches for row in batch) == Counter(range(num_rows))
    sizes = [len(batch) for batches in ranks for batch in batches]
    assert min(sizes) >= 1
    assert max(sizes) <= 8
    assert max(sizes) - min(sizes) <= 1  # no small remainder
    steps = -(-num_rows // (8 * num_replicas * accumulate))  # as few as batches of 8 allow
    assert [len(batches) for batches in ranks] == [steps * accumulate] * num_replicas


@pytest.mark.parametrize(("step", "limit", "left"), [(0, 1.0, 125), (100, 1.0, 25), (125, 1.0, 125), (3, 10, 7)])
def test_an_iteration_ends_with_the_epoch_wherever_it_begins(step: int, limit: float, left: int) -> None:
    assert len(list(sampler(step=lambda: step, limit=limit))) == left


def test_the_second_epoch_has_the_same_rows_in_other_batches() -> None:
    first, second = train(steps=250)[:125], train(steps=250)[125:]
    assert Counter(row for batch in second for row in batch) == Counter(range(1000))
    assert {frozenset(batch) for batch in first}.isdisjoint(frozenset(batch) for batch in second)


def test_another_seed_is_another_order() -> None:
    assert list(sampler(seed=1)) != list(sampler(seed=2))
    assert list(sampler(seed=1)) == list(sampler(seed=1))


@pytest.mark.parametrize("first_step", [0, 1, 62, 63, 100])
@pytest.mark.parametrize("limit", [1.0, 10, 7])
def test_resuming_at_any_step_gives_what_an_uninterrupted_run_gives(first_step: int, limit: float) -> None:
    settings: dict[str, Any] = {"accumulate": 2, "limit": limit}
    uninterrupted = train(steps=130, **settings)
    resumed = train(steps=130 - first_step, first_step=first_step, **settings)
    if limit == 7:  # an epoch's last step is a shorter one
        resumed, uninterrupted = resumed[:1], uninterrupted[-len(resumed) :][:1]
    assert resumed == uninterrupted[-len(resumed) :]


def test_a_batch_is_the_same_whenever_it_is_asked_for() -> None:
    buckets = sampler()
    forth = [buckets.step_rows(k).tolist() for k in range(400)]
    back = [buckets.step_rows(k).tolist() for k in reversed(range(400))]
    assert forth == back[::-1]


def test_an_epoch_is_drawn_once_also_where_two_meet() -> None:
    buckets = sampler()
    first, second = buckets.step_rows(124), buckets.step_rows(125)
    assert buckets.step_rows(124) is first
    assert buckets.step_rows(125) is second


def test_no_more_than_64_batches_are_sorted_together() -> None:
    lengths = np.random.default_rng(0).permutation(8192)
    buckets = BucketSampler(lengths, batch_size=8, seed=0, share=RankShare(), step=lambda: 0)
    spreads = [int(np.ptp(lengths[buckets.step_rows(k)])) for k in range(1024)]
    assert 7 / 9 < np.mean(spreads) / (8192 / 64 * 7 / 8) < 9 / 7  # 7 of the gaps between 512 rows


def padding(batches: list[list[int]]) -> float:
    padded = sum(len(batch) * LENGTHS[batch].max() for batch in batches)
    return float(1 - sum(LENGTHS[batch].sum() for batch in batches) / padded)


def test_batches_have_little_padding() -> None:
    shuffled = np.random.default_rng(0).permutation(1000).reshape(-1, 8).tolist()
    assert padding(shuffled) > 0.35  # negative control: what bucketing is there for
    assert padding(list(sampler())) < 0.06


def test_lengths_are_not_in_order_over_an_epoch() -> None:
    means = [float(LENGTHS[batch].mean()) for batch in sampler()]
    assert abs(float(np.corrcoef(means, np.arange(len(means)))[0, 1])) < 0.2


def gap(left: list[int], right: list[int]) -> int:
    return int(abs(LENGTHS[left].max() - LENGTHS[right].max()))


def test_the_ranks_of_a_step_have_rows_of_like_length() -> None:
    ranks = [list(sampler(num_replicas=2, rank=rank, batch_size=16)) for rank in range(2)]
    gaps = [gap(*batches) for batches in zip(*ranks, strict=True)]
    halves = [gap(batch[:16], batch[16:]) for batch in sampler(batch_size=32)]  # negative control: not dealt out
    assert 3 * np.mean(gaps) < np.mean(halves)


def test_small_epochs_are_cut_anew() -> None:
    epochs = [[frozenset(batch) for batch in sampler(num_rows=64, step=lambda e=e: 8 * e)] for e in range(2)]
    assert len(set(epochs[0]) & set(epochs[1])) <= 1


def test_too_few_rows_for_a_step_are_refused_with_the_numbers() -> None:
    assert len(sampler(num_rows=8, num_replicas=2, accumulate=4)) == 4
    message = "training rows (7) are fewer than micro-batches of an optimizer step (8: 2 devices x trainer.accumulate_"
    with pytest.raises(DataError, match=re.escape(message)):
        sampler(num_rows=7, num_replicas=2, accumulate=4)
    with pytest.raises(DataError, match=r"training rows \(0\) are fewer than micro-batches"):
        sampler(num_rows=0)


def test_rows_that_fill_most_micro_batches_are_enough() -> None:
    ranks = [list(sampler(num_rows=997, batch_size=1, num_replicas=8, accumulate=4, rank=rank)) for rank in range(8)]
    assert Counter(row for batches in ranks for batch in batches for row in batch) == Counter(range(997))
    assert Counter(len(batch) for batches in ranks for batch in batches) == {1: 997, 0: 27}  # of 32 steps of 32
