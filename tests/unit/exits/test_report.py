import pytest

from app.exits.predicted_speedup import predicted_speedup
from app.exits.quality import ExitScore
from app.exits.report import exit_figure, exit_table
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
    size = DraftSize(head_blocks=5.0, exit_blocks=1)
    assert predicted_speedup(0.72, exit_layer=2, num_layers=30, size=size) == pytest.approx(1.5, abs=0.02)
    assert predicted_speedup(0.88, exit_layer=2, num_layers=30, size=size) == pytest.approx(2.0, abs=0.02)
    one_draft = 35 / (8 + 2 + 33 * 1.02)
    assert predicted_speedup(0.0, exit_layer=2, num_layers=30, size=size) == pytest.approx(one_draft)


def test_only_the_deepest_block_is_called_the_full_model():
    assert [row[0] for row in exit_table(HISTORY, num_layers=3).rows] == ["1", "2"]


def test_figure_has_a_heat_map_of_exit_by_step_and_the_latest_curve():
    heat, curve, *_ = exit_figure(HISTORY).axes
    assert heat.images[0].get_array().tolist() == [[7.0, 5.0], [7.1, 4.5]]
    assert {"Held-out loss (nats a token)", "Exits at step 50"} <= {
        axes.get_title() for axes in exit_figure(HISTORY).axes
    }
    assert curve is not None
