import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from app.model import float32_products
from app.model.float32_products import fast_float32, speed_up_training

CPU = torch.device("cpu")


@pytest.fixture
def forced(monkeypatch):
    """As if on such a processor: elsewhere the switch does nothing, and all here must hold too."""
    monkeypatch.setattr(float32_products, "_onednn_is_faster", lambda: True)


def linears(*, bias=True):
    torch.manual_seed(0)
    plain = nn.Linear(160, 96, bias=bias)
    fast = copy.deepcopy(plain)
    speed_up_training(fast)
    return plain, fast


def test_products_keep_float32_precision():
    torch.manual_seed(0)
    for rows, inner, columns in ((512, 192, 256), (192, 1024, 64)):
        left, right = torch.randn(rows, inner), torch.randn(columns, inner)
        expected = left.double() @ right.double().T
        with fast_float32(CPU):
            got = left @ right.T
        assert (got - expected).abs().max() < 3e-6 * expected.abs().max()
        assert (left.bfloat16() @ right.bfloat16().T - expected).abs().max() > 1e-3 * expected.abs().max()


def test_the_setting_is_put_back_after_an_error_too(forced):
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(RuntimeError, match="shapes"), fast_float32(CPU):
        torch.ones(2, 3) @ torch.ones(2, 3)
    with fast_float32(CPU):
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    assert torch.backends.mkldnn.matmul.fp32_precision == before != "bf16"


@pytest.mark.parametrize("bias", [True, False])
def test_training_equals_plain_layers_to_rounding_and_evaluation_bit_for_bit(forced, bias):
    plain, fast = linears(bias=bias)
    assert type(fast) is nn.Linear
    grads = []
    for layer in (plain, fast):
        inputs = torch.randn(8, 32, 160, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = layer(inputs)
        out.square().sum().backward()
        grads.append([out, inputs.grad, *(parameter.grad for parameter in layer.parameters())])
        assert ("_ProductBackward" in _history(out)) == (layer is fast)
    for got, expected in zip(*grads, strict=True):
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5 * float(expected.detach().abs().max()))
    inputs = torch.randn(8, 32, 160)
    assert torch.equal(fast.eval()(inputs), F.linear(inputs, plain.weight, plain.bias))
    assert "_ProductBackward" not in _history(fast(inputs))


def _history(out):
    names, nodes = [], [out.grad_fn]
    while nodes:
        node = nodes.pop()
        names.append(type(node).__name__)
        nodes += [parent for parent, _ in node.next_functions if parent]
    return " ".join(names)


def test_small_products_and_autocast_are_left_alone(forced):
    _, fast = linears()
    assert "_ProductBackward" not in _history(fast(torch.randn(4, 160)))
    with torch.autocast("cpu", torch.bfloat16):
        out = fast(torch.randn(8, 32, 160))
    assert out.dtype == torch.bfloat16


def test_a_copy_uses_its_own_weights(forced):
    _, fast = linears(bias=False)
    other = copy.deepcopy(fast)
    with torch.no_grad():
        other.weight.zero_()
    inputs = torch.randn(8, 32, 160)
    assert other(inputs).abs().sum() == 0 < fast(inputs).abs().sum()


def test_processors_of_other_makers_keep_their_library(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "Intel(R) Xeon(R)"})
    assert not float32_products._onednn_is_faster.__wrapped__()


def test_rounding_products_are_not_taken(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "AMD EPYC"})
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda left, right: (left.bfloat16().mm(right.bfloat16())).float())
    assert not float32_products._onednn_is_faster.__wrapped__()
