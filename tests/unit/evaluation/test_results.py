"""Means, intervals, tables, files and figures from records made by hand."""

import csv
import io
import json
import math

import pytest

from app.evaluation.output import notes, write_results
from app.evaluation.records import Record, Score
from app.evaluation.results import as_csv, exits_table, mean_and_error, results_of, shown
from app.evaluation.tasks import TASKS


def _choice(task, row, early, full, group=""):
    scores = [Score(layer, "likelihood", {"acc": a, "acc_norm": b}) for layer, (a, b) in ((2, early), (4, full))]
    return Record(task, row, group, tuple(scores), chance=0.25)


RECORDS = [
    _choice("mmlu", 0, (1.0, 0.0), (1.0, 1.0), "law"),
    _choice("mmlu", 1, (0.0, 0.0), (1.0, 1.0), "art"),
    _choice("mmlu", 2, (0.0, 1.0), (0.0, 1.0), "art")._replace(truncated=True),
    Record("mmlu", 3, "art", ()),
    _choice("piqa", 0, (1.0, 0.0), (1.0, 1.0)),
    Record("text", 0, "emma", (Score(2, "likelihood", {"loss": 4.0}), Score(4, "likelihood", {"loss": 2.0})), weight=3),
    Record("text", 1, "emma", (Score(2, "likelihood", {"loss": 8.0}), Score(4, "likelihood", {"loss": 1.0})), weight=1),
    Record("text", 2, "ulysses", (Score(2, "likelihood", {"loss": 900.0}), Score(4, "likelihood", {"loss": 2.0}))),
    Record(
        "gsm8k", 0, "",
        (Score(4, "autoregressive", {"em": 1.0}), Score(2, "early_exit", {"em": 0.0}),
         Score(2, "self_speculative", {"em": 1.0})),
    ),
]  # fmt: skip


def _found(task, group, exit_layer, metric, strategy="likelihood"):
    key = task, group, exit_layer, strategy, metric
    (result,) = [each for each in results_of(RECORDS) if each[:5] == key]
    return result


def test_means_and_errors_by_hand():
    assert mean_and_error([(1.0, 1.0), (0.0, 1.0), (1.0, 1.0), (1.0, 1.0)]) == (0.75, pytest.approx(0.25))  # s/sqrt(n)
    assert mean_and_error([(5.0, 2.0)]) == (5.0, None)
    mean, error = mean_and_error([(4.0, 3.0), (8.0, 1.0)])
    assert mean == 5.0  # 3 * 4 + 8 over 4
    assert error == pytest.approx(math.sqrt((9 * 1 + 1 * 9) * 2) / 4)


def test_each_task_group_and_exit_has_its_scores():
    law, art, both = (_found("mmlu", group, 4, "acc") for group in ("law", "art", ""))
    assert (law.score, art.score, both.score) == (1.0, 0.5, pytest.approx(2 / 3))
    assert (law.num_examples, art.num_examples, both.num_examples) == (1, 2, 3)
    assert (law.standard_error, both.chance) == (None, 0.25)
    assert _found("mmlu", "", 2, "acc_norm").score == pytest.approx(1 / 3)
    emma = _found("text", "emma", 2, "perplexity")
    assert (emma.score, emma.num_examples, emma.chance) == (pytest.approx(math.exp(5.0)), 2, None)
    assert emma.standard_error == pytest.approx(math.exp(5.0) * math.sqrt(36) / 4)  # the delta method
    assert math.isfinite(_found("text", "ulysses", 2, "perplexity").score)
    assert _found("gsm8k", "", 2, "em", "self_speculative").score == 1.0
    (one,) = {each.group for each in results_of(RECORDS[5:7])}
    assert one == "emma"  # a single source is named


def test_the_table_has_an_exit_a_row_and_one_metric_of_each_task():
    table = exits_table(results_of(RECORDS), TASKS, num_layers=4, title="t")
    heads = [column.split("\n") for column in table.columns]
    assert [head[:2] for head in heads] == [
        ["exit"], ["mmlu", "acc, %"], ["piqa", "acc_norm, %"], ["text", "perplexity"],
        ["text/emma", "perplexity"], ["text/ulysses", "perplexity"], ["gsm8k", "em, %"],
    ]  # fmt: skip
    assert heads[1][2] == "n = 3"
    assert [row[0] for row in table.rows] == [
        "exit 2, early exit\n(lossy)", "exit 2, self-speculative\n(lossless, speed unknown)", "exit 4, full model",
        "guessing",
    ]  # fmt: skip

    assert table.title == "t: score (95 % interval)"
    assert [row[1] for row in table.rows] == ["33.3 (6..79)", "-", "66.7 (21..94)", "25.0"]
    assert [row[2] for row in table.rows] == ["0.0 (0..79)", "-", "100.0 (21..100)", "25.0"]
    assert [row[6] for row in table.rows] == ["0.0 (0..79)", "100.0 (21..100)", "100.0 (21..100)", "-"]
    low, high = (math.exp(1.75 + side * 12.71 * 1.5 / 4) for side in (-1, 1))  # Student's t of two windows
    assert table.rows[2][4] == f"{math.exp(1.75):.2f} ({low:.2f}..{high:.2f})"
    assert table.rows[0][5] == "1.0e+304"


def test_files_hold_every_result_and_the_figure_every_line(tmp_path, monkeypatch):
    drawn = []
    from app.evaluation import output

    original = output.evaluation_figure
    monkeypatch.setattr(output, "evaluation_figure", lambda *a, **k: drawn.append(original(*a, **k)) or drawn[0])
    file = tmp_path / "r.json"
    results = write_results(file, RECORDS, tasks=TASKS, title="t", about={"settings": {"limit": 3}})
    document = json.loads(file.read_text())
    assert document["settings"] == {"limit": 3}
    assert document["metrics"] == {"mmlu": "acc", "piqa": "acc_norm", "text": "perplexity", "gsm8k": "em"}
    assert document["rows"]["mmlu"] == {"scored": 3, "skipped": 1, "truncated": 1}
    assert document["results"] == [each._asdict() for each in results]
    assert (
        document["notes"]
        == notes(RECORDS, results)
        == [
            "mmlu: 1 prompt lost its beginning, to fit the model's context",
            "mmlu: 1 row skipped, longer than the model's context",
        ]
    )
    rows = list(csv.DictReader(io.StringIO(file.with_suffix(".csv").read_text())))
    assert len(rows) == len(results)
    assert rows[0] == {key: "" if value is None else str(value) for key, value in results[0]._asdict().items()}
    assert as_csv(results).splitlines()[0].startswith("task,group,exit_layer,strategy,metric,num_examples,score,")
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    shares, texts = drawn[0].axes
    labels = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in (shares, texts)]
    assert labels[0] == [
        "mmlu (acc)",
        "piqa (acc_norm)",
        "gsm8k (em)",
        "guessing, in the task's colour",
        "generated: early exit (lossy)",
        "generated: self-speculative (lossless), speedup",
    ]
    assert labels[1] == ["text", "text/emma", "text/ulysses"]
    lines = {line.get_linestyle(): line.get_ydata() for line in shares.lines if list(line.get_xdata()) == [0, 1]}
    assert [*lines["--"]] == [25.0, 25.0]  # the chance level
    assert len([each for each in shown(results, TASKS) if each.metric == "acc_norm"]) == 2
    places = [place for bars in shares.containers for place in bars.lines[0].get_xdata()]
    assert len({*places}) == len(places)  # no interval covers another
    assert {round(place) for place in places} == {each.exit_layer for each in results}
