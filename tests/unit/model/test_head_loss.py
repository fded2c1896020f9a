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
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, D, dtype=dtype), torch.randn(V, D, dtype=dtype)
    labels = torch.randint(V, (rows,))
    labels[::4] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels, torch.rand(rows, dtype=dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_losses_and_gradients_equal_those_of_whole_logits(dtype, tolerance):
    hidden, weight, labels, scale = problem(dtype)
    total, losses = WeightedCrossEntropy.apply(hidden, weight, labels, scale, dtype)
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    assert torch.allclose(losses, expected, atol=tolerance, rtol=tolerance)
    assert not losses.requires_grad
    ours = torch.autograd.grad(3.0 * total, (hidden, weight))
    for got, twin in zip(ours, torch.autograd.grad(3.0 * (scale * expected).sum(), (hidden, weight)), strict=True):
        assert torch.allclose(got, twin, atol=10 * tolerance)
        assert twin.abs().sum() > 0


def test_bfloat16_products_stay_near_and_sums_stay_in_float32():
    hidden, weight, labels, scale = problem(torch.float32)
    exact = cross_entropies(hidden, weight, labels, dtype=torch.float32, scale_N=scale)
    rounded = cross_entropies(hidden, weight, labels, dtype=torch.bfloat16, scale_N=scale)
    for got, expected in zip(rounded, exact, strict=True):
        assert got.dtype == torch.float32
        assert 0 < (got - expected).norm() < 0.02 * expected.norm()


def test_improbable_targets_have_finite_losses():
    hidden = torch.tensor([[1000.0], [-1000.0]])
    losses = cross_entropies(hidden, torch.tensor([[1.0], [0.0]]), torch.tensor([1, 0]), dtype=torch.float32)[0]
    assert losses.tolist() == [1000.0, 1000.0]


def test_without_labels_all_gradients_are_zero():
    for rows in (N, 0):
        hidden, weight, labels, scale = problem(rows=rows)
        total, _ = WeightedCrossEntropy.apply(hidden, weight, torch.full_like(labels, -100), scale, torch.float64)
        assert total == 0
        assert all(grad.abs().sum() == 0 for grad in torch.autograd.grad(total, (hidden, weight)))


def test_frozen_head_gets_no_gradient_and_the_hidden_states_get_theirs():
    hidden, weight, labels, scale = problem()
    whole = cross_entropies(hidden, weight, labels, dtype=torch.float64, scale_N=scale)
    total, _ = WeightedCrossEntropy.apply(hidden, weight.detach(), labels, scale, torch.float64)
    (got,) = torch.autograd.grad(total, hidden)
    assert torch.equal(got, whole[1])
    assert len(whole) == 3


def test_a_second_backward_is_refused():
    hidden, weight, labels, scale = problem()
    total, _ = WeightedCrossEntropy.apply(hidden, weight, labels, scale, torch.float64)
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


def test_memory_is_bound_by_the_chunk_whatever_the_number_of_positions():
    for rows in (40, 400):
        hidden, weight, labels, scale = problem(rows=rows)
        with Largest() as largest:
            cross_entropies(hidden.detach(), weight.detach(), labels, dtype=torch.float64, scale_N=scale)
        assert largest.elements == max(2 * 5 * V, rows * D)  # both buffers of a chunk, or the hidden states themselves
        assert largest.elements < rows * V
