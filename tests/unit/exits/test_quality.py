import pytest
import torch
from torch.nn import functional as F

from app.exits.quality import ExitQuality, GroupedTokenLoss


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
        kl = F.kl_div(logits.log_softmax(-1), full.softmax(-1), reduction="batchmean").item()
        assert score.kl == pytest.approx(kl, rel=1e-4, abs=1e-6)
        shared = torch.minimum(logits.softmax(-1), full.softmax(-1)).sum(-1)  # 1 - TV
        assert score.acceptance == pytest.approx(shared.mean().item(), rel=1e-5)
    assert quality.compute()[4].agreement == 1.0
    assert quality.compute()[1].agreement < 0.5


def test_drafts_that_are_chosen_from_some_ids_are_scored_as_they_will_be_used(problem):
    weight, hidden, labels = problem
    quality, ids = ExitQuality([1, 4], num_layers=4), torch.tensor([5, 0, 11, 7])
    quality.update(hidden, labels, lambda h: h @ weight.T, draft_ids_V=ids)
    full, exit_ = ((hidden[layer] @ weight.T)[labels != -100] for layer in (4, 1))
    drafts = torch.full_like(exit_, -torch.inf).index_copy(1, ids, exit_[:, ids])
    score, own = quality.compute()[1], quality.compute()[4]
    assert score.agreement == pytest.approx((drafts.argmax(-1) == full.argmax(-1)).float().mean().item())
    shared = torch.minimum(drafts.softmax(-1), full.softmax(-1)).sum(-1)
    assert score.acceptance == pytest.approx(shared.mean().item(), rel=1e-5)
    kl = F.kl_div(exit_[:, ids].log_softmax(-1), full[:, ids].softmax(-1), reduction="batchmean").item()
    assert score.kl == pytest.approx(kl, rel=1e-4)
    assert (own.agreement, own.acceptance) == (1.0, pytest.approx(1.0))


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
