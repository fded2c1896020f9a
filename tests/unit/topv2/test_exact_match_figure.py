from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pytest

from app.topv2.exact_match_figure import Metric, exact_match_figure


def _record(exit_layer: int, exact: float, *, drafts: int | None = None) -> dict[str, Any]:
    shares = {"exact_match": exact, "frame_match": exact + 0.1, "well_formed": 0.9}
    return {"exit_layer": exit_layer, "num_draft_tokens": drafts, "num_examples": 100} | shares


def _document(*records: dict[str, Any], stage: str = "test") -> dict[str, Any]:
    return {"stage": stage, "results": list(records)}


RUNS = {
    "baseline": _document(_record(12, 0.8), _record(3, 0.0), _record(6, 0.1), _record(6, 0.8, drafts=4)),
    "LD+EE": _document(_record(12, 0.75), _record(3, 0.5), _record(6, 0.7)),
}


@pytest.mark.parametrize(
    ("metric", "shares"), [("exact_match", [0.0, 10.0, 80.0]), ("frame_match", [10.0, 20.0, 90.0])]
)
def test_each_run_is_a_line_over_its_exits_and_drafts_are_not_in_it(metric: Metric, shares: list[float]) -> None:
    (axes,) = exact_match_figure(RUNS, metric=metric).axes
    baseline, other = (container[0] for container in axes.containers)
    assert list(baseline.get_xdata()) == list(other.get_xdata()) == [3, 6, 12]
    assert list(baseline.get_ydata()) == pytest.approx(shares)
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["baseline", "LD+EE"]


def test_bars_are_one_standard_error() -> None:
    (axes,) = exact_match_figure(RUNS).axes
    bars = axes.containers[1][2][0].get_segments()
    assert [high - low for (_, low), (_, high) in bars][1] == pytest.approx(2 * 100 * (0.7 * 0.3 / 100) ** 0.5)


def test_the_title_says_how_many_examples_of_which_stage() -> None:
    (axes,) = exact_match_figure(RUNS).axes
    assert axes.get_title().startswith("100 examples (test)")
    assert axes.get_xlabel().startswith("exit layer (blocks run")
    assert axes.get_ylabel() == "exact match (%)"
    few = _document(_record(3, 0.5) | {"num_examples": 7}, stage="validate")
    (axes,) = exact_match_figure(RUNS | {"few": few}).axes
    assert axes.get_title().startswith("7 to 100 examples (test, validate)")


def test_no_figure_stays_open() -> None:
    exact_match_figure(RUNS)
    assert plt.get_fignums() == []
