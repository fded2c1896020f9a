"""What a CPU emulates is said, and avoided where the user left the choice."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from app.model.cpu_precision import emulated

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)


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


def warn_of_emulation(trainer: Trainer) -> None:
    """Say that the CPU emulates `trainer.precision`: it trains several times slower, and nothing else would tell."""
    dtype = {"bf16": torch.bfloat16, "16": torch.float16}.get(str(trainer.precision).partition("-")[0])
    on_cpu = trainer.strategy.root_device.type == "cpu"
    if dtype and on_cpu and trainer.is_global_zero and (why := emulated(dtype)):
        _log.warning("trainer.precision %s: %s; --trainer.precision 32-true does not", trainer.precision, why)
