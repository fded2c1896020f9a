"""A warning where the CPU emulates the precision of training."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from app.model.cpu.precision import emulated

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_log = logging.getLogger(__name__)


def warn_of_emulation(trainer: Trainer) -> None:
    """Say that the CPU emulates `trainer.precision`: it trains several times slower, and nothing else would tell."""
    dtype = {"bf16": torch.bfloat16, "16": torch.float16}.get(str(trainer.precision).partition("-")[0])
    on_cpu = trainer.strategy.root_device.type == "cpu"
    if dtype and on_cpu and trainer.is_global_zero and (why := emulated(dtype)):
        _log.warning("trainer.precision %s: %s; --trainer.precision 32-true does not", trainer.precision, why)
