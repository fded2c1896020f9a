"""A loss or gradient that is not finite: found on all ranks alike, before it reaches the weights.

A skipped step changes neither weights nor optimizer states. It still is a step: `global_step`, the data position and
with them every schedule (learning rate, dropout, exits) go on, since all of them are functions of the step. So a run
that skips sees the same batches at the same steps as one that does not, and resumes as exactly.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from app.errors import DivergenceError, check_choice, check_range
from app.training.step_sums import StepSums, StepTotals, gathered

_log = logging.getLogger(__name__)

OnDivergence = Literal["stop", "skip"]


class DivergenceGuard:
    """What to do about steps that are not finite, and how often it was done.

    Args:
        on_divergence: stop (DivergenceError at the first), or skip.
        max_skipped_steps: Steps that may be skipped in the whole run, resumed or not, >= 1; one more ends it.

    Raises:
        ConfigError: On a value out of range.
    """

    def __init__(self, on_divergence: OnDivergence, max_skipped_steps: int) -> None:
        check_choice("on_divergence", on_divergence, get_args(OnDivergence))
        check_range("max_skipped_steps", max_skipped_steps, low=1)
        self.skips, self._max_skipped_steps = on_divergence == "skip", max_skipped_steps
        self.skipped_steps = 0
        self._steps_taken = 0  # by this process

    def accepts(
        self,
        module: LightningModule,
        optimizer: torch.optim.Optimizer,
        *,
        sums: StepSums,
        totals: StepTotals,
        grad_norm: Tensor,
    ) -> bool:
        """Whether this step is to be taken; if not, the optimizer will find no gradient. The same on all ranks.

        Args:
            module: At the step; the message names its parameters.
            optimizer: Whose gradients they are.
            sums: The step's losses, micro-batch by micro-batch.
            totals: Over all ranks.
            grad_norm: Of this rank's gradient, as it is now: under fp16 loss scaling a fused optimizer's is still
                scaled, any other's is not.

        Raises:
            DivergenceError: The step is not finite, and the policy is to stop or has skipped often enough.
        """
        trainer = module.trainer
        losses_finite = all(map(math.isfinite, totals.exit_losses.values()))
        if losses_finite and (totals.grads_finite or _scaler_will_mend(trainer)):
            self._steps_taken += 1
            return True
        at = f"at step {trainer.global_step} with exits {sorted(totals.exit_losses)} on"
        if losses_finite:
            found = f"gradient norm is {float(grad_norm)} {at}, {_gradients_at(module)}"
        else:
            found = f"{_losses(totals.exit_losses)} {at}, {_losses_at(sums)}"
        if not self.skips:
            raise DivergenceError(f"{found}; the step was not taken: {self._advice(module)}")
        if self.skipped_steps == self._max_skipped_steps:
            raise DivergenceError(
                f"{found}; {self._max_skipped_steps} steps of this run were skipped before, as many as"
                " model.max_skipped_steps allows: resume an earlier checkpoint with a lower learning rate"
            )
        self.skipped_steps += 1
        if trainer.is_global_zero:
            _log.warning("%s; skipped, %d of %d", found, self.skipped_steps, self._max_skipped_steps)
        _drop_gradients(trainer, optimizer)
        return False

    def _advice(self, module: LightningModule) -> str:
        """What helps, by what the weights are and whether a checkpoint has them. All ranks must ask together."""
        trainer = module.trainer
        resumed, skip = bool(trainer.ckpt_path), "or skip such steps with --model.on_divergence skip"
        if poisoned := _places([(name, parameter) for name, parameter in module.named_parameters()], module):
            if self._steps_taken:
                return f"a step before left weights that are not finite in {poisoned}: {_EARLIER}, {_LOWER}"
            return f"the weights that it began with are not finite in {poisoned}: {_EARLIER if resumed else _OTHERS}"
        if not self._steps_taken and resumed:
            return f"it is the first one after the checkpoint, whatever the learning rate: {_EARLIER}, {skip}"
        if not self._steps_taken:
            return f"it is the first one, whatever the learning rate: look at its data and the precision, {skip}"
        if resumed or any(map(_has_saved, trainer.checkpoint_callbacks)):
            return f"the last checkpoint is good: resume it {_LOWER}, {skip}"
        return f"no checkpoint was saved yet: start anew {_LOWER}, {skip}"


_LOWER = "with a lower learning rate"
_EARLIER = "resume an earlier checkpoint (callbacks.LastCheckpoint: keep_previous keeps one)"
_OTHERS = "start from others"


def _has_saved(saver: Any) -> bool:
    """Whether a callback, Lightning's or a user's, has written a checkpoint."""
    return bool(getattr(saver, "last_model_path", "") or getattr(saver, "best_model_path", ""))


def _scaler(trainer: Trainer) -> Any:  # torch.amp.GradScaler | None
    """That of precision 16-mixed."""
    return getattr(trainer.precision_plugin, "scaler", None)


def _scaler_will_mend(trainer: Trainer) -> bool:
    """Whether the gradient left fp16's range because it is scaled: the scaler itself skips the step and scales less.

    Once the scale is down to 1, scaling is not to blame.
    """
    scaler = _scaler(trainer)
    return scaler is not None and scaler.get_scale() > 1


def _drop_gradients(trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
    """So that the optimizer, whose step cannot be called off any more, leaves weights and states as they are."""
    # A fused optimizer is told by the scaler to do nothing; the scaler looks for gradients that make it say so.
    scaler_decides = _scaler(trainer) is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not scaler_decides:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.fill_(torch.inf)


def _losses(exit_losses: Mapping[int, float]) -> str:
    layer, value = next((layer, value) for layer, value in exit_losses.items() if not math.isfinite(value))
    return f"loss at exit {layer} is {value}"


def _losses_at(sums: StepSums) -> str:
    return _listed([f"rank {rank} micro-batch {micro}" for rank, micro in sums.not_finite_at()])


def _gradients_at(module: LightningModule) -> str:
    """Where the gradient is not finite, by parameter and rank; a gradient that was summed over ranks is so on all."""
    return f"in {_places([(name, p.grad) for name, p in module.named_parameters() if p.requires_grad], module)}"


def _places(tensors: Sequence[tuple[str, Tensor | None]], module: LightningModule) -> str:
    """Names and ranks of those that are not finite; empty if all are. All ranks must ask together."""
    found_WN = gathered(torch.tensor([_not_finite(tensor) for _, tensor in tensors], device=module.device))
    names = _listed([tensors[idx][0] for idx in found_WN.any(dim=0).nonzero().flatten().tolist()])
    ranks = _listed([str(rank) for rank in found_WN.any(dim=1).nonzero().flatten().tolist()])
    return names and f"{names} on rank {ranks}"


def not_finite_weights(module: LightningModule) -> str:
    """Names of this rank's parameters that are not finite; empty if all are."""
    return _listed([name for name, parameter in module.named_parameters() if _not_finite(parameter)])


def _not_finite(tensor: Tensor | None) -> bool:
    return tensor is not None and not bool(torch.isfinite(_local(tensor)).all())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _listed(items: list[str], *, most: int = 3) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
