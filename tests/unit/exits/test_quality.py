import pytest
import torch
from torch.nn import functional as F

from app.exits.quality import ExitQuality, ExitScore, GroupedTokenLoss
from app.exits.report import exit_figure, exit_table


@pytest.fixture
def problem():
    torch.manual_seed(0)
    weight = torch.randn(13, 6)
    hidden = {layer: torch.randn(3, 400, 6) for layer in (1, 2, 4)}
    labels = torch.randint(13, (3, 400))
    labels[0, :50] = -100
    return weight, hidden, labels


def test_scores_equal_a_plain_computation_over_several_chunks_and_batches(problem):
    weight, hidden, labels = problem
    quality = ExitQuality([1, 2, 4], num_layers=4)
    for row in range(3):  # in batches
        quality.update(
            {layer: h[row : row + 1] for layer, h in hidden.items()}, labels[row : row + 1], lambda h: h @ weight.T
        )
    counted = labels != -100
    full = (hidden[4] @ weight.T)[counted]
    for layer, score in quality.compute().items():
        logits = (hidden[layer] @ weight.T)[counted]
        assert score.loss == pytest.approx(F.cross_entropy(logits, labels[counted]).item(), rel=1e-5)
        assert score.agreement == pytest.approx((logits.argmax(-1) == full.argmax(-1)).float().mean().item())
        assert score.perplexity == pytest.approx(torch.tensor(score.loss).exp().item(), rel=1e-4)
    assert quality.compute()[4].agreement == 1.0
    assert quality.compute()[1].agreement < 0.5


def test_nothing_seen_gives_no_scores():
    quality = ExitQuality([1, 2], num_layers=2)
    quality.update({1: torch.randn(1, 3, 6), 2: torch.randn(1, 3, 6)}, torch.full((1, 3), -100), lambda h: h)
    assert quality.compute() == {}


def test_grouped_loss_weighs_tokens_not_batches():
    metric = GroupedTokenLoss(3)
    metric.update(
        torch.tensor([[1.0, 3.0], [5.0, 0.0]]), torch.tensor([[True, True], [True, False]]), torch.tensor([0, 1])
    )
    metric.update(torch.tensor([[2.0, 2.0]]), torch.tensor([[True, True]]), torch.tensor([0]))
    total, by_group = metric.compute()
    assert total.item() == pytest.approx(13 / 5)
    assert by_group[:2].tolist() == pytest.approx([2.0, 5.0])
    assert torch.isnan(by_group[2])


HISTORY = {0: {1: ExitScore(7.0, 0.1), 2: ExitScore(7.1, 1.0)}, 50: {1: ExitScore(5.0, 0.6), 2: ExitScore(4.5, 1.0)}}


def test_table_shows_first_and_last_measurement_of_every_exit():
    table = exit_table(HISTORY, num_layers=2)
    assert "step 0" in table.columns[1]
    assert table.rows[0][:3] == ("1", "7.000", "5.000")
    assert table.rows[1][0] == "2 (full)"
    assert table.rows[0][4] == "60.0%"


def test_only_the_deepest_block_is_called_the_full_model():
    assert [row[0] for row in exit_table(HISTORY, num_layers=3).rows] == ["1", "2"]


def test_figure_has_a_heat_map_of_exit_by_step_and_the_latest_curve():
    heat, curve, *_ = exit_figure(HISTORY).axes
    assert heat.images[0].get_array().tolist() == [[7.0, 5.0], [7.1, 4.5]]
    assert {"Held-out loss (nats a token)", "Exits at step 50"} <= {
        axes.get_title() for axes in exit_figure(HISTORY).axes
    }
    assert curve is not None
