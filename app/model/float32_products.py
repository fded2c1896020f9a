"""Float32 products of training through oneDNN where the BLAS library uses half of the processor.

PyTorch multiplies float32 matrices on a CPU by MKL, whose kernels for AMD processors do without AVX-512; oneDNN,
which PyTorch has for bfloat16, does not. Sums are taken in another order, nothing is rounded that was not before.
"""

from __future__ import annotations

from functools import cache
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SETTINGS: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
_MIN_MULTIPLICATIONS = 2**21  # of a product; for fewer, oneDNN's longer calls cost what its kernels gain


class fast_float32:  # noqa: N801 - a context manager
    """Inside, float32 products on an AMD processor go through oneDNN; all else is as it was.

    Not around attention: PyTorch's kernel for CPUs is made of many small products, which oneDNN's calls slow fivefold.
    """

    def __init__(self, device: torch.device) -> None:
        self._on = device.type == "cpu" and _onednn_is_faster()

    def __enter__(self) -> None:
        if self._on:  # the public switch to oneDNN's kernels: "may round to bfloat16", which they do on AMX tiles only
            self._before, _SETTINGS.fp32_precision = _SETTINGS.fp32_precision, "bf16"

    def __exit__(self, *_: object) -> None:
        if self._on:
            _SETTINGS.fp32_precision = self._before


@cache
def _onednn_is_faster() -> bool:
    if "AMD" not in str(torch.cpu.get_capabilities().get("cpu_name")):
        return False
    number, before = torch.full((256, 256), 1 + 2**-20), _SETTINGS.fp32_precision
    _SETTINGS.fp32_precision = "bf16"
    try:
        return torch.equal(torch.eye(256) @ number, number)  # not where it does round
    finally:
        _SETTINGS.fp32_precision = before


class _Product(torch.autograd.Function):
    """x W^T with all three products of forward and backward inside fast_float32."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        with fast_float32(inputs.device):
            return F.linear(inputs, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,), (inputs, weight) = grads, ctx.saved_tensors
        with fast_float32(grad.device):
            grad_inputs = grad @ weight if ctx.needs_input_grad[0] else None
            grad_weight = grad.flatten(0, -2).t() @ inputs.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return grad_inputs, grad_weight


def speed_up_training(module: nn.Module) -> None:
    """Let the plain linear layers in `module` train through oneDNN where that is faster; what evaluation does stays."""
    if _onednn_is_faster():
        for linear in module.modules():
            if type(linear) is nn.Linear:  # the class stays: decoding looks for it
                linear.forward = MethodType(_forward, linear)  # type: ignore[method-assign]


def _forward(self: nn.Linear, inputs: Tensor) -> Tensor:
    float32 = inputs.dtype == self.weight.dtype == torch.float32 and inputs.device.type == "cpu"
    large = inputs.numel() * self.out_features >= _MIN_MULTIPLICATIONS
    if not (self.training and float32 and large) or torch.is_autocast_enabled("cpu"):
        return F.linear(inputs, self.weight, self.bias)
    product: Tensor = _Product.apply(inputs, self.weight)  # type: ignore[no-untyped-call]
    return product if self.bias is None else product + self.bias
