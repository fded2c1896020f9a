from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from app.layerskip.distillation import divergence_loss
from app.model import head_loss
from app.model.early_exit import LossHead
from app.model.head_loss import Teacher, WeightedTokenLosses, token_losses

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
    total, losses = WeightedTokenLosses.apply(weight, labels, weights, None, dtype, *hidden)
    expected = torch.stack([F.cross_entropy(each @ weight.T, labels, reduction="none") for each in hidden])
    assert torch.allclose(losses, expected, atol=tolerance, rtol=tolerance)
    assert not losses.requires_grad
    twin = 3.0 * (torch.tensor(weights, dtype=dtype)[:, None] * expected).sum()
    ours = torch.autograd.grad(3.0 * total, (*hidden, weight))
    for got, theirs in zip(ours, torch.autograd.grad(twin, (*hidden, weight)), strict=True):
        assert torch.allclose(got, theirs, atol=10 * tolerance)
        assert theirs.abs().sum() > 0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("trained_head", [True, False])
def test_a_teacher_s_losses_equal_those_of_whole_logits_and_it_learns_nothing(dtype, tolerance, trained_head):
    hidden, weight, labels, weights = problem(torch.promote_types(dtype, torch.float32))
    weight.requires_grad_(trained_head)
    full = torch.randn_like(hidden[0]).requires_grad_()
    teacher = Teacher(full, [partial(divergence_loss, "kl"), None])
    total, losses = WeightedTokenLosses.apply(weight, labels, weights, teacher, dtype, *hidden)
    drafts, counted = [each @ weight.T for each in hidden], labels != -100
    p = (full @ weight.T).detach().softmax(-1)
    kl = (p * (p.log() - drafts[0].log_softmax(-1))).sum(-1) * counted
    expected = torch.stack([kl, F.cross_entropy(drafts[1], labels, reduction="none")])
    assert (losses - expected).norm() <= tolerance * expected.norm()
    inputs = (*hidden, weight) if trained_head else hidden
    ours = torch.autograd.grad(3.0 * total, (*inputs, full), allow_unused=True)
    twin = 3.0 * (torch.tensor(weights, dtype=expected.dtype)[:, None] * expected).sum()
    for got, theirs in zip(ours[:-1], torch.autograd.grad(twin, inputs), strict=True):
        assert (got - theirs).norm() <= tolerance * theirs.norm()
        assert theirs.abs().sum() > 0
    assert ours[-1] is None


def test_bfloat16_products_stay_near_and_sums_stay_in_float32():
    hidden, weight, labels, weights = problem(torch.float32)
    exact = token_losses(hidden, weight, labels, dtype=torch.float32, weights=weights)
    rounded = token_losses(hidden, weight, labels, dtype=torch.bfloat16, weights=weights)
    for got, expected in zip(rounded, exact, strict=True):
        assert got.dtype == torch.float32
        assert 0 < (got - expected).norm() < 0.02 * expected.norm()


def test_improbable_targets_have_finite_losses():
    hidden = torch.tensor([[1000.0], [-1000.0]])
    losses = token_losses([hidden], torch.tensor([[1.0], [0.0]]), torch.tensor([1, 0]), dtype=torch.float32)[0]
    assert losses.tolist() == [[1000.0, 1000.0]]


def test_without_labels_all_gradients_are_zero():
    for rows in (N, 0):
        hidden, weight, labels, weights = problem(rows=rows)
        total, _ = WeightedTokenLosses.apply(
            weight, torch.full_like(labels, -100), weights, None, torch.float64, *hidden
        )
        assert total == 0
        assert all(grad.abs().sum() == 0 for grad in torch.autograd.grad(total, (*hidden, weight)))


def test_frozen_head_gets_no_gradient_and_the_hidden_states_get_theirs():
    hidden, weight, labels, weights = problem()
    whole = token_losses(hidden, weight, labels, dtype=torch.float64, weights=weights)
    total, _ = WeightedTokenLosses.apply(weight.detach(), labels, weights, None, torch.float64, *hidden)
    for got, expected in zip(torch.autograd.grad(total, hidden), whole[1:3], strict=True):
        assert torch.equal(got, expected)
    assert len(whole) == 4


def test_a_second_backward_is_refused():
    hidden, weight, labels, weights = problem()
    total, _ = WeightedTokenLosses.apply(weight, labels, weights, None, torch.float64, *hidden)
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
    for rows, exits, taught in ((40, 1, False), (400, 1, False), (400, 8, False), (400, 8, True)):
        hidden, weight, labels, _ = problem(rows=rows)
        states, settings = hidden[0].detach(), {"dtype": torch.float64, "weights": [1.0] * exits}
        if taught:
            settings["teacher"] = Teacher(states, [partial(divergence_loss, "lk")] * exits)
        with Largest() as largest:
            token_losses([states] * exits, weight.detach(), labels, **settings)
        buffers = 3 if taught else 2
        assert largest.elements == max(buffers * 5 * V, rows * D)  # those of a chunk, or an exit's hidden states
        assert largest.elements < rows * V


def test_losses_over_some_token_ids_are_those_of_a_head_with_their_rows_alone():
    generator = torch.Generator().manual_seed(0)
    head = LossHead(6, 11, bias=True).double()
    hidden, normed = (torch.randn(7, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    hidden.requires_grad_()
    ids, labels = torch.tensor([8, 0, 5]), torch.tensor([9, -100, 1, 2, 3, 4, 5])  # labels only say what counts
    teacher = Teacher(normed, [partial(divergence_loss, "kl")])
    total, losses = head([hidden], labels, [0.5], teacher, ids)
    (gradient,) = torch.autograd.grad(total, hidden)
    p, q = ((state @ head.weight.T + head.bias)[:, ids].log_softmax(-1) for state in (normed, hidden))
    expected = (p.exp() * (p - q)).sum(-1) * (labels != -100)
    torch.testing.assert_close(losses[0], expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(0.5 * expected.sum(), hidden)[0])
