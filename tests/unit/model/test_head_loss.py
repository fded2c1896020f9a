import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from app.model import head_loss
from app.model.head_loss import WeightedCrossEntropy, cross_entropies

N, D, V = 23, 8, 50


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr(head_loss, "_MIN_LOGITS", 1)
    monkeypatch.setattr(head_loss, "_MAX_LOGITS", 5 * V)  # chunks of five rows, the last one of three


def problem(dtype=torch.float64, *, rows=N):
    """Hidden states of two exits, the head's weight, labels, and the exits' weights."""
    torch.manual_seed(0)
    hidden = [torch.randn(rows, D, dtype=dtype, requires_grad=True) for _ in range(2)]
    labels = torch.randint(V, (rows,))
    labels[::4] = -100
    return hidden, torch.randn(V, D, dtype=dtype, requires_grad=True), labels, (0.3, 0.9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_losses_and_gradients_equal_those_of_whole_logits(dtype, tolerance):
    hidden, weight, labels, weights = problem(dtype)
    total, losses = WeightedCrossEntropy.apply(weight, labels, weights, dtype, *hidden)
    expected = torch.stack([F.cross_entropy(each @ weight.T, labels, reduction="none") for each in hidden])
    assert torch.allclose(losses, expected, atol=tolerance, rtol=tolerance)
    assert not losses.requires_grad
    twin = 3.0 * (torch.tensor(weights, dtype=dtype)[:, None] * expected).sum()
    ours = torch.autograd.grad(3.0 * total, (*hidden, weight))
    for got, theirs in zip(ours, torch.autograd.grad(twin, (*hidden, weight)), strict=True):
        assert torch.allclose(got, theirs, atol=10 * tolerance)
        assert theirs.abs().sum() > 0


def test_bfloat16_products_stay_near_and_sums_stay_in_float32():
    hidden, weight, labels, weights = problem(torch.float32)
    exact = cross_entropies(hidden, weight, labels, dtype=torch.float32, weights=weights)
    rounded = cross_entropies(hidden, weight, labels, dtype=torch.bfloat16, weights=weights)
    for got, expected in zip(rounded, exact, strict=True):
        assert got.dtype == torch.float32
        assert 0 < (got - expected).norm() < 0.02 * expected.norm()


def test_improbable_targets_have_finite_losses():
    hidden = torch.tensor([[1000.0], [-1000.0]])
    losses = cross_entropies([hidden], torch.tensor([[1.0], [0.0]]), torch.tensor([1, 0]), dtype=torch.float32)[0]
    assert losses.tolist() == [[1000.0, 1000.0]]


def test_without_labels_all_gradients_are_zero():
    for rows in (N, 0):
        hidden, weight, labels, weights = problem(rows=rows)
        total, _ = WeightedCrossEntropy.apply(weight, torch.full_like(labels, -100), weights, torch.float64, *hidden)
        assert total == 0
        assert all(grad.abs().sum() == 0 for grad in torch.autograd.grad(total, (*hidden, weight)))


def test_frozen_head_gets_no_gradient_and_the_hidden_states_get_theirs():
    hidden, weight, labels, weights = problem()
    whole = cross_entropies(hidden, weight, labels, dtype=torch.float64, weights=weights)
    total, _ = WeightedCrossEntropy.apply(weight.detach(), labels, weights, torch.float64, *hidden)
    for got, expected in zip(torch.autograd.grad(total, hidden), whole[1:3], strict=True):
        assert torch.equal(got, expected)
    assert len(whole) == 4


def test_a_second_backward_is_refused():
    hidden, weight, labels, weights = problem()
    total, _ = WeightedCrossEntropy.apply(weight, labels, weights, torch.float64, *hidden)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


def test_memory_is_bound_by_the_chunk_whatever_the_number_of_positions_and_exits():
    for rows, exits in ((40, 1), (400, 1), (400, 8)):
        hidden, weight, labels, _ = problem(rows=rows)
        with Largest() as largest:
            cross_entropies(
                [hidden[0].detach()] * exits, weight.detach(), labels, dtype=torch.float64, weights=[1.0] * exits
            )
        assert largest.elements == max(2 * 5 * V, rows * D)  # both buffers of a chunk, or an exit's hidden states
        assert largest.elements < rows * V
