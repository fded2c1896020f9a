"""KL, TV and LK against autograd and a table computed by hand."""

import math
from typing import get_args

import pytest
import torch

from app.layerskip import distillation
from app.layerskip.distillation import KL_SHARES, DistillationLoss, divergence_loss, divergences

# Two distributions, and what they give by hand.
P, Q = [1 / 2, 1 / 4, 1 / 4], [1 / 8, 3 / 8, 1 / 2]
KL = math.log(2) - math.log(3) / 4  # 1/2 log 4 + 1/4 log 2/3 + 1/4 log 1/2
TV = 3 / 8  # 1/2 (3/8 + 1/8 + 1/4)
C = math.exp(-3 * 5 / 8)
# s = (-1/2, 1/2, 1/2) and sum q s = 3/8, so the gradient of TV is q (s - 3/8).
GRADIENTS = {"kl": [-3 / 8, 1 / 8, 1 / 4], "total_variation": [-7 / 64, 3 / 64, 4 / 64]}
LOSSES = {"kl": KL, "total_variation": TV, "lk": C * KL + (1 - C) * TV}
GRADIENTS["lk"] = [C * kl + (1 - C) * tv for kl, tv in zip(GRADIENTS["kl"], GRADIENTS["total_variation"], strict=True)]


@pytest.mark.parametrize("kind", KL_SHARES)
def test_losses_and_gradients_equal_those_computed_by_hand(kind: str) -> None:
    draft, full = torch.tensor([Q], dtype=torch.float64).log() + 3.0, torch.tensor([P], dtype=torch.float64).log() - 1.0
    (loss,), (gradient,) = divergence_loss(kind, draft, full)  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(LOSSES[kind], abs=1e-12)
    assert gradient.tolist() == pytest.approx(GRADIENTS[kind], abs=1e-12)


@pytest.mark.parametrize("kind", KL_SHARES)
def test_gradients_equal_autograd_s_and_nothing_given_is_changed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "_PIECE", 3 * 11)  # three rows at a time, the last time one
    torch.manual_seed(0)
    draft, full = 3 * torch.randn(2, 7, 11, dtype=torch.float64)
    given = draft.clone(), full.clone()
    losses, gradient = divergence_loss(kind, draft, full)  # type: ignore[arg-type]
    assert torch.equal(draft, given[0])
    assert torch.equal(full, given[1])
    in_place = draft.clone()
    again = divergence_loss(kind, in_place, full, gradient_NV=in_place)  # type: ignore[arg-type]
    assert torch.equal(again[0], losses)
    assert again[1] is in_place
    assert torch.equal(in_place, gradient)
    p, q = full.softmax(-1), draft.requires_grad_().softmax(-1)
    kl, tv = (p * (p / q).log()).sum(-1), (p - q).abs().sum(-1) / 2
    share = {"kl": 1.0, "total_variation": 0.0, "lk": (-3 * (1 - tv)).exp().detach()}[kind]
    expected = share * kl + (1 - share) * tv
    assert torch.allclose(losses, expected, atol=1e-12)
    assert torch.allclose(divergences(draft.detach(), full).kl_N, kl, atol=1e-12)
    assert torch.allclose(divergences(draft.detach(), full).total_variation_N, tv, atol=1e-12)
    assert torch.allclose(gradient, torch.autograd.grad(expected.sum(), draft)[0], atol=1e-12)


def test_equal_predictions_have_no_loss_and_no_gradient() -> None:
    logits = torch.tensor([[100.0, -100.0, 30.0]])
    for kind in KL_SHARES:
        loss, gradient = divergence_loss(kind, logits + 1.0, logits)
        assert loss.item() == pytest.approx(0, abs=1e-6)
        assert not gradient.any()


def test_disjoint_predictions_have_the_largest_total_variation_and_a_finite_divergence() -> None:
    kl, tv = divergences(torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]]))
    assert (kl.item(), tv.item()) == (200.0, 1.0)


def test_every_loss_but_that_of_the_labels_is_in_the_table() -> None:
    assert set(KL_SHARES) == set(get_args(DistillationLoss)) - {"cross_entropy"}
