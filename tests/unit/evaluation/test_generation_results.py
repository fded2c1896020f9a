"""Lossy and lossless generation are told apart in table, JSON, CSV and figure, with the speed of each."""

import csv
import json
from pathlib import Path

import pytest

from app.evaluation.figure import evaluation_figure
from app.evaluation.journal import Journal
from app.evaluation.output import notes, write_results
from app.evaluation.records import Decoded, Record, Score
from app.evaluation.results import Result, exits_table, results_of, shown
from app.evaluation.tasks import TASKS
from callbacks.task_evaluation import _metrics


def _record(row: int, *, full: float, early: float, identical: bool = True) -> Record:
    return Record(
        "topv2",
        row,
        "weather",
        (
            Score(8, "autoregressive", {"exact_match": full, "frame_match": full}, Decoded(10, 1.0)),
            Score(6, "early_exit", {"exact_match": early, "frame_match": full}, Decoded(20, 1.5)),
            Score(6, "self_speculative", {"exact_match": full, "frame_match": full}, Decoded(10, 0.5, 8, 6, identical)),
        ),
    )


RECORDS = [_record(0, full=1.0, early=0.0), _record(1, full=1.0, early=1.0), _record(2, full=0.0, early=0.0)]
CHOICES = [Record("boolq", 0, "", tuple(Score(layer, "likelihood", {"acc": 1.0}) for layer in (4, 6, 8)), chance=0.5)]


def _one(results: list[Result], strategy: str, metric: str = "exact_match") -> Result:
    (result,) = (each for each in results if (each.strategy, each.metric) == (strategy, metric))
    return result


def test_each_way_has_its_score_speed_and_loss() -> None:
    results = results_of(RECORDS)
    full, lossy, drafts = (_one(results, name) for name in ("autoregressive", "early_exit", "self_speculative"))
    assert (full.score, lossy.score, drafts.score) == pytest.approx((2 / 3, 1 / 3, 2 / 3))
    assert full.standard_error == lossy.standard_error == pytest.approx((2 / 9 / 2) ** 0.5)
    assert (full.lossless, lossy.lossless, drafts.lossless) == (True, False, True)
    assert (full.ms_per_token, lossy.ms_per_token, drafts.ms_per_token) == pytest.approx((100, 75, 50))
    assert (drafts.speedup, drafts.acceptance_rate, drafts.identical_share) == pytest.approx((2, 0.75, 1))
    assert full.speedup is lossy.speedup is lossy.acceptance_rate is None
    choice = results_of(CHOICES)[0]
    assert choice.lossless is choice.ms_per_token is None


def test_records_are_the_same_when_they_are_read_again(tmp_path: Path) -> None:
    with Journal(tmp_path / "records.jsonl", {"limit": 3}) as journal:
        for record in RECORDS:
            journal.add(record)
    with Journal(tmp_path / "records.jsonl", {"limit": 3}) as journal:
        assert [*journal.records.values()] == RECORDS


def test_rows_of_the_table_say_what_is_lossy_and_what_is_not() -> None:
    table = exits_table(results_of([*RECORDS, *CHOICES]), TASKS, num_layers=8, title="t")
    assert [row[:2] for row in table.rows] == [
        ("exit 4", "-"),
        ("exit 6, early exit\n(lossy)", "33.3 (6..79)"),
        ("exit 6, self-speculative\n(lossless, 2.0x)", "66.7 (21..94)"),
        ("exit 8, full model", "66.7 (21..94)"),
        ("guessing", "-"),
    ]
    assert [row[2] for row in table.rows] == ["100.0 (21..100)", "100.0 (21..100)", "-", "100.0 (21..100)", "50.0"]
    assert "| exit 6, self-speculative (lossless, 2.0x) | 66.7" in table.as_markdown()


def test_logged_names_tell_the_ways_apart() -> None:
    logged = _metrics(shown(results_of(RECORDS), TASKS), "val")
    assert logged == {
        "val/task/topv2/exact_match/exit_08": pytest.approx(2 / 3),
        "val/task/topv2/exact_match/exit_06": pytest.approx(1 / 3),
        "val/task/topv2/exact_match_self_speculative/exit_06": pytest.approx(2 / 3),
        "val/task/topv2/speedup_self_speculative/exit_06": pytest.approx(2.0),
    }


def test_files_and_figure_tell_the_ways_apart(tmp_path: Path) -> None:
    results = write_results(tmp_path / "r.json", RECORDS, tasks=TASKS, title="t", about={})
    written = json.loads((tmp_path / "r.json").read_text())["results"]
    with (tmp_path / "r.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    for found in (written, rows):
        drafts = next(each for each in found if each["strategy"] == "self_speculative")
        assert (str(drafts["lossless"]), float(drafts["speedup"])) == ("True", 2.0)
        assert str(next(each for each in found if each["strategy"] == "early_exit")["lossless"]) == "False"
    figure = evaluation_figure(shown(results, TASKS), title="t")
    (axes,) = figure.axes
    legend = axes.get_legend()
    assert legend is not None
    said = [text.get_text() for text in legend.get_texts()]
    assert "generated: early exit (lossy)" in said
    assert "generated: self-speculative (lossless), speedup" in said
    assert "2.0x" in [text.get_text() for text in axes.texts]


def test_answers_that_are_not_the_full_models_are_told() -> None:
    assert notes(RECORDS, results_of(RECORDS)) == []
    records = [*RECORDS, _record(3, full=1.0, early=0.0, identical=False)]
    (note,) = notes(records, results_of(records))
    assert note.startswith("topv2: 25.0% of the answers drafted from exit 6 differ from the full model's")
