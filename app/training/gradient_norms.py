"""How large the gradient of each block is. Tested by tests/unit/training/test_module.py."""

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from app import metric_names


def is_logged(trainer: Trainer, step: int) -> bool:
    """Whether the loggers get the metrics of this optimizer step, counted from 0."""
    steps = trainer.log_every_n_steps  # type: ignore[attr-defined]  # 0 turns logging off
    return bool(steps and (step + 1) % steps == 0)


def log_gradient_norms(module: LightningModule, blocks: Sequence[nn.Module], whole: Tensor, *, scale: float) -> None:
    """Log the norm of each block's gradient and of the `whole` one over `scale`; all ranks that share weights together.

    A block that no sample entered has a gradient of 0. Frozen blocks are left out.
    """
    grads = [[p.grad for p in block.parameters() if p.grad is not None] for block in blocks]
    norms = torch.stack([torch.nn.utils.get_total_norm(of_block) for of_block in grads if of_block] + [whole])
    if isinstance(norms, DTensor):
        norms = norms.full_tensor()
    *by_block, total = (norms / scale).tolist()
    module.log(metric_names.GRADIENT_NORM_WHOLE, total)
    found = iter(by_block)
    for number, (block, of_block) in enumerate(zip(blocks, grads, strict=True), start=1):
        if any(p.requires_grad for p in block.parameters()):
            module.log(metric_names.of_block(metric_names.GRADIENT_NORM, number), next(found) if of_block else 0.0)
