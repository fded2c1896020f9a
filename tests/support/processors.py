"""This processor, and others as PyTorch would describe them."""

import pytest
import torch

from app.model.cpu.precision import emulated

AVX2 = {"architecture": "x86_64", "cpu_name": "AMD EPYC", "avx512_bf16": False}
AVX512_BF16 = {"architecture": "x86_64", "cpu_name": "AMD EPYC", "avx512_bf16": True, "avx512_fp16": False}
ARM = {"architecture": "arm64", "bf16": True, "fp16_arith": True}


def fast_dtype() -> torch.dtype:
    """The type, of float32 and bfloat16, whose products take less time on this processor."""
    return torch.float32 if emulated(torch.bfloat16) else torch.bfloat16


def fake_processor(monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, object], kernels: str) -> None:
    """Let PyTorch report these units, and kernels made for these instructions."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: kernels)
