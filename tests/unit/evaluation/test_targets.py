from __future__ import annotations

from typing import Any

import pytest

from app.evaluation.targets import (
    TARGETS,
    Winners,
    decode_vs_transformers,
    self_speculative_speedup,
    speedup_prediction_error,
    vs_transformers_early_exit,
    winners,
)


def _result(
    strategy: str, speed: float | None, exit_layer: int | None = None, drafts: int | None = None, **more: Any
) -> dict[str, Any]:
    return {
        "strategy": strategy, "exit_layer": exit_layer, "num_draft_tokens": drafts, "tokens_per_second": speed,
        "identical_to_autoregressive": 1.0, "speedup": None, "predicted_speedup": None,
    } | more  # fmt: skip


GRID = [
    _result("autoregressive", 10.0),
    _result("transformers", 8.0),
    _result("self_speculative", 15.0, 1, 2),
    _result("self_speculative", 22.0, 1, 4, speedup=2.2, predicted_speedup=2.0),
    _result("self_speculative", 99.0, 2, 4, identical_to_autoregressive=0.9),
    _result("self_speculative", 21.0, 2, 2),
    _result("transformers_early_exit", 11.0, 1, 2),
    _result("transformers_early_exit", 10.0, 1, 4),
    _result("transformers_early_exit", 30.0, 2, 4),
]


def test_the_winner_is_the_fastest_with_identical_output_and_transformers_best_length_at_its_exit() -> None:
    assert winners(GRID) == Winners(exit_layer=1, num_draft_tokens=4, transformers_num_draft_tokens=2)
    assert winners(GRID[:4]) == Winners(exit_layer=1, num_draft_tokens=4, transformers_num_draft_tokens=None)
    assert winners([GRID[0], GRID[4]]) is None


def test_only_the_winners_and_what_has_no_setting_are_read() -> None:
    assert Winners(1, 4, 2).only(GRID) == [GRID[0], GRID[1], GRID[3], GRID[6]]


def test_values_by_hand() -> None:
    confirmed = Winners(1, 4, 2).only(GRID)
    assert decode_vs_transformers(confirmed) == pytest.approx(1.25)
    assert self_speculative_speedup(confirmed) == pytest.approx(2.2)
    assert vs_transformers_early_exit(confirmed) == pytest.approx(2.0)
    assert speedup_prediction_error(confirmed) == pytest.approx(0.1)
    slower = [*confirmed[:2], _result("self_speculative", 9.0, 1, 4, speedup=0.9, predicted_speedup=1.0)]
    assert speedup_prediction_error(slower) == pytest.approx(0.1)  # on either side


@pytest.mark.parametrize("target", TARGETS)
def test_what_was_not_measured_has_no_value(target: str) -> None:
    assert TARGETS[target].value([]) is None
    assert TARGETS[target].value([_result("autoregressive", 10.0), _result("self_speculative", None, 1, 2)]) is None


def test_an_error_passes_from_below_and_a_speedup_from_above() -> None:
    error, speedup = TARGETS["speedup_prediction_error"], TARGETS["self_speculative_speedup"]
    assert [error.passed(value) for value in (0.14, 0.15, 0.16)] == [True, True, False]
    assert [speedup.passed(value) for value in (1.99, 2.0, 2.01)] == [False, True, True]
