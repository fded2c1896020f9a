"""A loss or gradient that is not finite, found on all ranks alike before it reaches the weights.

A skipped step changes neither weights nor optimizer states. It still counts: `global_step`, the data position and every
schedule (learning rate, dropout, exits) go on, since all are functions of the step. So a run that skips sees the same
batches at the same steps as one that does not, and resumes as exactly. Tested by tests/integration/test_divergence.py.

Shape legend: `W` ranks, `A` micro-batches of a step, `E` exits that are on.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from app.checkpoints.integrity import is_finite
from app.errors import DivergenceError, check_choice, check_range

_log = logging.getLogger(__name__)

OnDivergence = Literal["stop", "skip"]

_LOWER = "with a lower learning rate"
_ALLOW = "--allow_changes '[model.optimizer]'"
_EARLIER = "resume an earlier checkpoint (callbacks.LastCheckpoint: keep_previous keeps one)"


class StepTotals(NamedTuple):
    """A step over all micro-batches and ranks. All but the last field are the same on every rank."""

    num_label_tokens: float
    exit_losses: dict[int, float]  # exit_layer -> mean cross entropy, in nats a label token
    grads_finite: bool  # on every rank
    own_sums_AE: Tensor  # this rank's sums of losses, by micro-batch and exit


class DivergenceGuard:
    """Decides about steps that are not finite, and counts those skipped: `skipped_steps` of the whole run.

    `stop` raises DivergenceError at the first such step, `skip` when `max_skipped_steps`, >= 1, were skipped.
    """

    def __init__(self, on_divergence: OnDivergence, max_skipped_steps: int) -> None:
        check_choice("on_divergence", on_divergence, get_args(OnDivergence))
        check_range("max_skipped_steps", max_skipped_steps, low=1)
        self.skips, self._max_skipped_steps = on_divergence == "skip", max_skipped_steps
        self.skipped_steps = 0
        self._steps_taken = 0  # by this process

    def accepts(
        self, module: LightningModule, optimizer: torch.optim.Optimizer, *, totals: StepTotals, grad_norm: Tensor
    ) -> bool:
        """Whether this step is to be taken, the same on all ranks. If not, the optimizer's gradients are dropped.

        `grad_norm` is that of this rank's gradient, which fp16 loss scaling still scales under a fused optimizer.
        DivergenceError if the step is not finite, and the policy is to stop or has skipped often enough.
        """
        trainer = module.trainer
        losses_finite = all(map(math.isfinite, totals.exit_losses.values()))
        scaler = gradient_scaler(trainer)
        # At a scale above 1 the gradient may be out of fp16's range only because it is scaled. The scaler then skips
        # the step by itself and scales less.
        if losses_finite and (totals.grads_finite or (scaler is not None and scaler.get_scale() > 1)):
            self._steps_taken += 1
            return True
        found = f"at step {trainer.global_step} with exits {sorted(totals.exit_losses)} on"
        if losses_finite:
            grads = [(name, p.grad) for name, p in module.named_parameters() if p.requires_grad]
            found = f"gradient norm is {float(grad_norm)} {found}, in {_names_and_ranks(grads, module)}"
        else:
            exit_layer, loss = next(each for each in totals.exit_losses.items() if not math.isfinite(each[1]))
            flags_WA = _gathered((~torch.isfinite(totals.own_sums_AE)).any(dim=1))
            micro_batches = [f"rank {rank} micro-batch {micro}" for rank, micro in flags_WA.nonzero().tolist()]
            found = f"loss at exit {exit_layer} is {loss} {found}, {_listed(micro_batches)}"
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
        """What may help, by the state of the weights and of the checkpoints. All ranks must call it together."""
        trainer = module.trainer
        resumed, skip = bool(trainer.ckpt_path), "or skip such steps with --model.on_divergence skip"
        if poisoned := _names_and_ranks([*module.named_parameters()], module):
            if self._steps_taken:
                return f"a step before left weights that are not finite in {poisoned}: {_EARLIER} {_LOWER} and {_ALLOW}"
            return f"the weights that it began with are not finite in {poisoned}: start from others"
        if not self._steps_taken and resumed:
            return f"it is the first one after the checkpoint, whatever the learning rate: {_EARLIER}, {skip}"
        if not self._steps_taken:
            return f"it is the first one, whatever the learning rate: look at its data and the precision, {skip}"
        savers: list[Any] = trainer.checkpoint_callbacks  # Lightning's or a user's
        paths = ("last_model_path", "best_model_path")
        if resumed or any(getattr(saver, path, "") for saver in savers for path in paths):
            return f"the last checkpoint has finite weights: resume it {_LOWER} and {_ALLOW}, {skip}"
        return f"no checkpoint was saved yet: start anew {_LOWER}, {skip}"


def gradient_scaler(trainer: Trainer) -> Any:  # torch.amp.GradScaler | None
    """The gradient scaler of precision 16-mixed."""
    return getattr(trainer.precision_plugin, "scaler", None)


def _drop_gradients(trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer's step, which cannot be cancelled any more, leave weights and states as they are."""
    # The scaler tells a fused optimizer to do nothing if it finds gradients that are not finite.
    scaler_decides = gradient_scaler(trainer) is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not scaler_decides:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.fill_(torch.inf)


def _names_and_ranks(tensors: Sequence[tuple[str, Tensor | None]], module: LightningModule) -> str:
    """Names and ranks of the tensors that are not finite; empty if all are. All ranks must call it together."""
    own = [tensor is not None and not is_finite(tensor) for _, tensor in tensors]
    found_WN = _gathered(torch.tensor(own, device=module.device))
    names = _listed([tensors[idx][0] for idx in found_WN.any(dim=0).nonzero().flatten().tolist()])
    ranks = _listed([str(rank) for rank in found_WN.any(dim=1).nonzero().flatten().tolist()])
    return names and f"{names} on rank {ranks}"


def _gathered(flags_N: Tensor) -> Tensor:
    """The flags [N] of every rank, as [W, N]; all ranks together."""
    own = flags_N.to(torch.uint8)
    if not dist.is_initialized():
        return own[None]
    of_ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, own)
    return torch.stack(of_ranks)


def _listed(items: list[str], *, most: int = 3) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
