from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import ConfigError
from datamodules.mixture import BLOCK_ROWS, MixtureOrder


def test_shares_are_exact_to_one_row_a_block() -> None:
    weights = [0.55, 0.3, 0.15]
    order = MixtureOrder(weights=weights, num_rows=[70, 900, 11], seed=3)
    for block in (0, 1, 17):
        rows = range(block * BLOCK_ROWS, (block + 1) * BLOCK_ROWS)
        seen = Counter(order.row(n)[0] for n in rows)
        for source, weight in enumerate(weights):
            assert abs(seen[source] - weight * BLOCK_ROWS) <= 1


def test_a_source_shows_each_row_once_before_any_repeats() -> None:
    order = MixtureOrder(weights=[2, 1], num_rows=[300, 77], seed=0)
    seen: list[list[int]] = [[], []]
    for n in range(3000):
        source, row = order.row(n)
        seen[source].append(row)
    for rows, size in zip(seen, (300, 77), strict=True):
        epochs = [rows[start : start + size] for start in range(0, len(rows) - size, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert epochs[0] != epochs[1]  # and another order every time


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 2**32), st.lists(st.integers(1, 50), min_size=1, max_size=4))
def test_a_row_does_not_depend_on_what_was_asked_before(n: int, seed: int, num_rows: list[int]) -> None:
    weights = [1.0 + index for index in range(len(num_rows))]
    used = MixtureOrder(weights=weights, num_rows=num_rows, seed=seed)
    before = [used.row(n + offset) for offset in (0, 5000, 3, 1)]
    for offset, row in zip((0, 5000, 3, 1), before, strict=True):
        assert MixtureOrder(weights=weights, num_rows=num_rows, seed=seed).row(n + offset) == row


def test_another_seed_is_another_order_and_the_global_generator_is_left_alone() -> None:
    np.random.seed(0)  # noqa: NPY002 - to see that it is not used
    state = np.random.get_state()[1].copy()  # type: ignore[index,union-attr]  # noqa: NPY002
    orders = [MixtureOrder(weights=[1, 1], num_rows=[100, 100], seed=seed) for seed in (0, 1)]
    rows = [[order.row(n) for n in range(200)] for order in orders]
    assert rows[0] != rows[1]
    assert (np.random.get_state()[1] == state).all()  # type: ignore[index]  # noqa: NPY002


def test_a_source_too_light_to_be_seen_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"weight: got 0\.0001"):
        MixtureOrder(weights=[1.0, 0.0001], num_rows=[5, 5], seed=0)
