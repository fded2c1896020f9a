import pytest
import torch
import torch.nn.functional as F

from app.model.cpu import attention
from app.model.cpu.attention import attend
from app.model.early_exit import EarlyExitModel
from tests.support.tiny_models import tiny_llama

B, H, T, W = 2, 4, 7, 8


def states(*, key_heads=H, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    heads = (H, key_heads, key_heads)
    return [torch.randn(B, h, T, W, generator=generator).to(dtype).requires_grad_() for h in heads]


def document_mask():
    """Two documents a row, of other lengths in the second row."""
    mask = torch.ones(B, 1, T, T, dtype=torch.bool).tril()
    mask[0, :, 3:, :3] = False
    mask[1, :, 5:, :5] = False
    return mask


CASES = {
    "causal": {"is_causal": True},
    "mask": {"attn_mask": document_mask()},
    "added mask": {"attn_mask": torch.zeros(B, 1, T, T).masked_fill(~document_mask(), -torch.inf)},
    "scale": {"is_causal": True, "scale": 0.3},
    "neither": {},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("key_heads", [H, 2])
def test_attention_by_products_equals_torchs_with_its_gradients(case, key_heads):
    inputs = states(key_heads=key_heads)
    ours = attend(*inputs, **CASES[case], enable_gqa=key_heads != H)
    theirs = F.scaled_dot_product_attention(*inputs, **CASES[case], enable_gqa=key_heads != H)
    assert torch.allclose(ours, theirs, atol=1e-6)
    upstream = torch.linspace(-1, 1, ours.numel()).view_as(ours)
    for got, expected in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream), strict=True
    ):
        assert torch.allclose(got, expected, atol=1e-5)


def calls(monkeypatch, *, autocast=True, train=True, length=T):
    """How often a training forward attends by products, and its hidden states."""
    seen = []
    monkeypatch.setattr(attention, "attend", lambda *args, **kwargs: seen.append(1) or attend(*args, **kwargs))
    model = tiny_llama(num_layers=3).train(train)
    early = EarlyExitModel(model)
    ids = torch.arange(2 * length).view(2, length) % 61
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = early.hidden_by_exit(ids, torch.arange(length).expand(2, length), [3])[3]
    return len(seen), hidden


def test_blocks_train_with_it_in_bfloat16_alone(monkeypatch):
    assert calls(monkeypatch)[0] == 3
    assert calls(monkeypatch, autocast=False)[0] == 0
    assert calls(monkeypatch, train=False)[0] == 0
    monkeypatch.setattr(attention, "_MAX_LENGTH", T - 1)
    assert calls(monkeypatch)[0] == 0


def test_a_block_computes_what_it_does_with_torchs_attention_but_for_rounding(monkeypatch):
    _, ours = calls(monkeypatch)
    monkeypatch.setattr(attention, "_MAX_LENGTH", 0)
    _, theirs = calls(monkeypatch)
    assert 0 < (ours - theirs).norm() < 0.02 * theirs.norm()


def test_activation_checkpointing_computes_the_same_again(monkeypatch):
    grads = []
    for checkpointing in (False, True):
        model = tiny_llama(num_layers=3).train()
        early = EarlyExitModel(model)
        if checkpointing:
            model.activation_checkpointing_enable()
        ids = torch.arange(2 * T).view(2, T) % 61
        with torch.autocast("cpu", torch.bfloat16):
            early.hidden_by_exit(ids, torch.arange(T).expand(2, T), [3])[3].square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert all(torch.equal(plain, again) for plain, again in zip(*grads, strict=True))
