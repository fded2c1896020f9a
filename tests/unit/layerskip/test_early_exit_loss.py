import pytest
import torch
from torch.nn import functional as F

from app.layerskip.early_exit_loss import IGNORE_INDEX, early_exit_loss


@pytest.fixture
def problem():
    torch.manual_seed(0)
    head = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    hidden = {layer: torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True) for layer in (2, 3, 6)}
    labels = torch.randint(11, (2, 7))
    labels[0, 3] = labels[1, 6] = IGNORE_INDEX
    return head, hidden, labels


def weighted_losses(head):
    def losses(hidden, labels, weights):
        flat = [F.cross_entropy((h @ head.T).flatten(0, -2), labels.flatten(), reduction="none") for h in hidden]
        total = sum(weight * losses.sum() for weight, losses in zip(weights, flat, strict=True))
        return total, torch.stack(flat).view(-1, *labels.shape).detach()

    return losses


def test_loss_and_gradients_equal_a_plain_loop_over_exits(problem):
    head, hidden, labels = problem
    weights = {2: 0.2, 3: 0.3, 6: 0.5}
    got = early_exit_loss(hidden, labels, weights, weighted_losses(head))
    inputs = [head, *hidden.values()]
    expected = sum(
        weights[layer] * F.cross_entropy((hidden[layer] @ head.T).flatten(0, 1), labels.flatten(), reduction="sum")
        for layer in weights
    )
    assert got.weighted_sum.item() == pytest.approx(expected.item())
    for ours, theirs in zip(
        torch.autograd.grad(got.weighted_sum, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_sums_count_label_tokens_only(problem):
    head, hidden, labels = problem
    got = early_exit_loss(hidden, labels, {6: 1.0}, weighted_losses(head))
    assert got.num_label_tokens.item() == 12
    mean = F.cross_entropy((hidden[6] @ head.T).flatten(0, 1), labels.flatten())
    assert (got.weighted_sum / got.num_label_tokens).item() == pytest.approx(mean.item())
    assert got.exit_sums.tolist() == pytest.approx([got.weighted_sum.item()])


def test_exits_that_are_off_get_no_gradient(problem):
    head, hidden, labels = problem
    early_exit_loss(hidden, labels, {2: 0.5, 6: 0.5}, weighted_losses(head)).weighted_sum.backward()
    assert hidden[3].grad is None
    assert hidden[2].grad.abs().sum() > 0


def test_exit_sums_carry_no_gradient(problem):
    head, hidden, labels = problem
    assert not early_exit_loss(hidden, labels, {6: 1.0}, weighted_losses(head)).exit_sums.requires_grad
