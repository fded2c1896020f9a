from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from rich.console import Console
from rich.table import Table as RichTable

from app.benchmark.decoding_comparison import DecodingComparison
from app.benchmark.speedup_interval import PairedTimes
from app.errors import DataError
from app.topv2.evaluation import ParseResult
from app.topv2.metrics import ParseScore, ParseScores
from app.topv2.report import (
    Metric,
    ParseReport,
    exact_match_figure,
    read_report,
    report_metrics,
    report_table,
    write_report,
)
from tests.unit.topv2.test_evaluation import PLAN, evaluate


def _report(**changes: object) -> ParseReport:
    results, _ = evaluate()
    report = ParseReport(stage="test", step=70, checkpoint=None, num_ranks=1, plan=PLAN, results=list(results.values()))
    return replace(report, **changes)  # type: ignore[arg-type]


def test_records_hold_what_was_measured_and_none_elsewhere() -> None:
    full, early, _, timed, drafting, _ = _report().records()
    assert (full["strategy"], full["exit_layer"], full["num_draft_tokens"]) == ("autoregressive", 4, None)
    assert full["by_group"]["weather"] == {
        "exact_match": 0.5,
        "frame_match": 0.5,
        "well_formed": 0.5,
        "num_examples": 2,
    }
    assert full["ms_per_token"] is full["speedup"] is early["ms_per_token"] is timed["speedup"] is None
    assert drafting["identical_share"] == 1.0
    assert timed["ms_per_token"] / drafting["ms_per_token"] == pytest.approx(drafting["speedup"])
    assert full.keys() == early.keys() == timed.keys() == drafting.keys()


def test_metrics_tell_exits_drafts_and_groups_apart() -> None:
    metrics = report_metrics(_report(stage="validate"))
    assert metrics["parse/exact_match/exit_04"] == 2 / 3
    assert metrics["parse/frame_match/exit_01"] == 1 / 3
    assert metrics["parse/exact_match_by_domain/weather/exit_04"] == 0.5
    assert metrics["parse/self_speculative/exact_match/exit_01_drafts_02"] == 2 / 3
    assert metrics["parse/autoregressive/exact_match/exit_04_drafts_00"] == 2 / 3
    assert metrics["parse/autoregressive/ms_per_token/exit_04_drafts_00"] > 0
    assert 0 < metrics["parse/self_speculative/acceptance_rate/exit_01_drafts_02"] < 1
    assert "parse/speedup/exit_01" not in metrics
    assert report_metrics(_report()).keys() == {f"test/{name}" for name in metrics}


def test_the_table_has_a_row_a_way_and_a_row_a_group() -> None:
    table = report_table(_report())
    cells = {row[:3]: row for row in table.rows}
    assert cells["full model", "4", "-"][3:7] == ("3", "66.7%", "66.7%", "66.7%")
    assert cells["early exit", "1", "-"][3:] == ("3", "0.0%", "33.3%", "33.3%", "-", "-", "-", "-")
    assert cells["self speculative", "1", "2"][-1] == "100.0%"
    assert cells["full model: weather", "4", "-"][3:] == ("2", "50.0%", "50.0%", "50.0%", "-", "-", "-", "-")
    assert cells["autoregressive", "4", "0"][3:8] == ("3", "66.7%", "66.7%", "66.7%", "-")
    assert table.title == "Semantic parses generated (test, step 70)"
    assert report_table(_report(step=None)).title == "Semantic parses generated (test)"
    assert report_table(_report(num_ranks=2)).title.endswith("on 2 ranks")


def test_the_table_of_all_domains_is_at_most_120_wide() -> None:
    score = ParseScore(1.0, 1.0, 1.0, 10_000)
    times = PairedTimes(10_000, 1e7, 1e4, 1.0, 1.0, 1.0)
    speed = DecodingComparison(**dict.fromkeys(DecodingComparison.__dataclass_fields__, 10_000) | {"times": times})
    scores = ParseScores(score, {"navigation": score, "messaging": score})
    report = _report(results=[ParseResult(way, scores, speed if way.num_draft_tokens else None) for way in PLAN.ways])
    table = report_table(report)
    drawn = RichTable(*table.columns, title=table.title)
    for row in table.rows:
        drawn.add_row(*row)
    assert Console(width=1000).measure(drawn).maximum <= 120


def test_a_report_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    report, path = _report(), tmp_path / "new" / "parse_test.json"
    write_report(report, path)
    document = read_report(path)
    assert document["results"] == report.records()
    assert (document["stage"], document["step"], document["plan"]["max_new_tokens"]) == ("test", 70, 8)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "{}",
        "[]",
        '{"stage": "test", "results": 3}',
        '{"stage": "test", "results": [{"speedup": 1}]}',
        '{"stage": "test", "results": []}',
    ],
)
def test_a_file_that_is_no_report_is_refused_by_name(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=r"report.json: no results of semantic parses"):
        read_report(path)


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


def test_bars_are_95_percent_intervals() -> None:
    (axes,) = exact_match_figure(RUNS).axes
    bars = axes.containers[1][2][0].get_segments()
    assert [(low, high) for (_, low), (_, high) in bars][1] == pytest.approx((60.4, 78.1), abs=0.05)  # of 70 of 100


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
