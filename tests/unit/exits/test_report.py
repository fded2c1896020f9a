import math

import pytest

from app.exits.predicted_speedup import predicted_speedup
from app.exits.quality import ExitScore
from app.exits.report import exit_figure, exit_table, gap_figure, scaling_figure
from app.protocols import DraftSize

HISTORY = {
    0: {1: ExitScore(7.0, 0.1), 2: ExitScore(7.1, 1.0)},
    50: {1: ExitScore(5.0, 0.6, 1.25, 0.55), 2: ExitScore(4.5, 1.0, 0.0, 1.0)},
}


def test_table_shows_first_and_last_measurement_of_every_exit():
    table = exit_table(HISTORY, num_layers=2)
    assert "step 0" in table.columns[1]
    assert table.rows[0][:3] == ("1", "7.000", "5.000")
    assert table.rows[1][0] == "2 (full)"
    assert table.rows[0][4:] == ("60.0%", "1.250", "55.0%")
    predicted = exit_table(HISTORY, num_layers=2, speedups={1: 1.234})
    assert predicted.columns[-1] == "predicted speedup"
    assert [row[-1] for row in predicted.rows] == ["1.23x", ""]


def test_the_predicted_speedup_is_that_of_the_best_number_of_drafts():
    size = DraftSize(head_blocks=5.0, draft_head_blocks=5.0, exit_blocks=1)
    assert predicted_speedup(0.72, exit_layer=2, num_layers=30, size=size) == pytest.approx(1.5, abs=0.02)
    assert predicted_speedup(0.88, exit_layer=2, num_layers=30, size=size) == pytest.approx(2.0, abs=0.02)
    eighth = size._replace(draft_head_blocks=5.0 / 8)
    assert predicted_speedup(0.56, exit_layer=2, num_layers=30, size=eighth) == pytest.approx(1.5, abs=0.02)
    assert predicted_speedup(0.74, exit_layer=2, num_layers=30, size=eighth) == pytest.approx(2.0, abs=0.02)
    one_draft = 35 / (8 + 2 + 33 * 1.02)
    assert predicted_speedup(0.0, exit_layer=2, num_layers=30, size=size) == pytest.approx(one_draft)


def test_only_the_deepest_block_is_called_the_full_model():
    assert [row[0] for row in exit_table(HISTORY, num_layers=3).rows] == ["1", "2"]


def test_the_heat_map_shows_how_much_more_loss_each_exit_has_than_the_full_model():
    heat, _ = gap_figure(HISTORY).axes
    assert heat.images[0].get_array().tolist() == [pytest.approx([-0.1, 0.5]), [0.0, 0.0]]
    of_many = {step: dict.fromkeys(range(1, 25), ExitScore(3.0, 1.0)) for step in range(1000, 31_000, 1000)}
    heat, _ = gap_figure(of_many).axes
    assert [label.get_text() for label in heat.get_xticklabels()] == ["6000", "12k", "18k", "24k", "30k"]
    assert [label.get_text() for label in heat.get_yticklabels()] == ["3", "6", "9", "12", "15", "18", "21", "24"]


def test_the_curves_over_exits_are_the_latest_ones():
    gaps, agreement = exit_figure(HISTORY).axes
    assert gaps.get_title() == "Exits after step 50"
    assert [list(axes.lines[0].get_ydata()) for axes in (gaps, agreement)] == [[0.5, 0.0], [60.0, 100.0]]


def test_the_scaling_figure_draws_the_exits_and_the_full_models_perplexity_of_each_run():
    (axes,) = scaling_figure({"ours": HISTORY, "control": HISTORY}, exit_layer=1).axes
    assert [line.get_label() for line in axes.lines][:2] == ["ours, exit 1", "ours, full model"]
    assert list(axes.lines[0].get_ydata()) == pytest.approx([math.exp(7.0), math.exp(5.0)])
    assert [line.get_linestyle() for line in axes.lines] == ["-", "-", "--", "--"]
