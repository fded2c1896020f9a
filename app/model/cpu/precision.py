"""Tells which short floating-point types this processor has units for; PyTorch emulates the others, slowly."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

import torch

from app.words import dtype_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)

_UNITS = {  # of x86, AMX and ARM, as torch.cpu.get_capabilities names them
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}
_KERNELS_WITHOUT = ("NO AVX", "DEFAULT", "AVX2")  # PyTorch's for x86, as the variable ATEN_CPU_CAPABILITY chooses them


def emulated(dtype: torch.dtype) -> str | None:
    """Why products of this type are slow on this processor, as part of a message; None where they are not."""
    found = torch.cpu.get_capabilities()
    lacks_kernels = found["architecture"] == "x86_64" and torch.backends.cpu.get_cpu_capability() in _KERNELS_WITHOUT
    if dtype not in _UNITS or (any(found.get(unit) for unit in _UNITS[dtype]) and not lacks_kernels):
        return None
    name = dtype_name(dtype)
    return f"{found.get('cpu_name') or 'this processor'} emulates {name}, up to ten times slower than float32"


def training_precision() -> Literal["bf16-mixed", "32-true"]:
    """The `trainer.precision` that trains in less time on this processor."""
    return "32-true" if emulated(torch.bfloat16) else "bf16-mixed"


def avoid_emulation(model: PreTrainedModel, *, field: str, chosen: bool) -> None:
    """Convert a CPU model's weights of an emulated type to float32; only warn where the user has `chosen` the type."""
    if model.device.type != "cpu" or (why := emulated(model.dtype)) is None:
        return
    if chosen:
        _log.warning("%s: %s; --dtype float32 takes twice the memory for weights", field, why)
        return
    name = dtype_name(model.dtype)
    message = "%s: weights become float32, in twice the memory, since %s; --dtype %s keeps their type"
    _log.warning(message, field, why, name)
    model.to(torch.float32)
    model.config.dtype = torch.float32
