"""Which of the short floating-point types this processor has units for; PyTorch emulates the others, slowly."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)

_UNITS = {  # of x86, AMX and ARM, as torch.cpu.get_capabilities names them
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}
_KERNELS_WITHOUT = (
    "NO AVX",
    "DEFAULT",
    "AVX2",
)  # of PyTorch on x86, where the variable ATEN_CPU_CAPABILITY asks for them


def emulated(dtype: torch.dtype) -> str | None:
    """Why products of this type are slow on this processor, as part of a message; None where it has units for them."""
    found = torch.cpu.get_capabilities()
    kernels = torch.backends.cpu.get_cpu_capability()
    x86 = found["architecture"] == "x86_64"
    able = any(found.get(unit) for unit in _UNITS.get(dtype, ())) and not (x86 and kernels in _KERNELS_WITHOUT)
    if able or dtype not in _UNITS:
        return None
    name = str(dtype).removeprefix("torch.")
    return f"{found.get('cpu_name') or 'this processor'} emulates {name}, up to ten times slower than float32"


def fast_dtype() -> torch.dtype:
    """The type whose products take least time on this processor, among float32 and bfloat16."""
    return torch.float32 if emulated(torch.bfloat16) else torch.bfloat16


def training_precision() -> Literal["bf16-mixed", "32-true"]:
    """`trainer.precision` that trains in least time on this processor."""
    return "32-true" if emulated(torch.bfloat16) else "bf16-mixed"


def avoid_emulation(model: PreTrainedModel, *, field: str, chosen: bool) -> None:
    """Turn weights of a type that this CPU emulates to float32, in one line; `chosen` types are warned of alone."""
    if model.device.type != "cpu" or (why := emulated(model.dtype)) is None:
        return
    if chosen:
        _log.warning("%s: %s; --dtype float32 takes twice the memory for weights", field, why)
        return
    name = str(model.dtype).removeprefix("torch.")
    _log.warning("%s: in float32, at twice the memory for weights: %s (--dtype %s keeps it)", field, why, name)
    model.to(torch.float32)
    model.config.dtype = torch.float32
