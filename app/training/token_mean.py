"""One optimizer step, whose gradients become those of the mean over all label tokens of its micro-batches and ranks.

Its sums take one reduction and one wait for the device. Shape legend: `E` exits that are on.
"""

from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from app import metric_names
from app.data_ranks import data_ranks
from app.errors import ConfigError
from app.layerskip.early_exit_loss import EarlyExitLoss
from app.training.divergence import DivergenceGuard, StepTotals, gradient_scaler
from app.training.gradient_norms import is_logged, log_gradient_norms

# Any constant would do, since gradients are scaled to the exact mean before the optimizer sees them. One near the
# tokens of a batch keeps them near their final size until then, so that fp16 loss scaling works as usual.
_NOMINAL_TOKENS = 4096.0
_OF_A_STEP = (metric_names.TRAIN_LOSS, metric_names.TRAIN_LABEL_TOKENS, metric_names.TRAIN_EXIT_LOSS)


class TokenMeanStep:
    """Collects a step's micro-batches, divides once by their label tokens, and clips by the norm that this gives."""

    def __init__(self, guard: DivergenceGuard) -> None:
        self.guard = guard
        self._micro_batches: list[Tensor] = []  # [1 + E] each: label tokens, then the loss sum of every exit
        self._exit_weights: Mapping[int, float] | None = None  # of the step, once it has begun
        self._grad_norm: Tensor = torch.zeros(())

    def clear(self) -> None:
        self._micro_batches = []
        self._exit_weights = None

    def add(self, loss: EarlyExitLoss, exit_weights: Mapping[int, float]) -> Tensor:
        """Add a micro-batch; returns the scalar, not normalised, from which its backward starts.

        ConfigError if exits or weights differ from those of the step's first micro-batch, so that there is no mean.
        """
        if self._exit_weights not in (None, exit_weights):
            got = f"{self._exit_weights}, then {exit_weights} in the same optimizer step"
            fix = "make them a function of trainer.global_step"
            raise ConfigError("set_exit_weights", got=got, allowed="the same in all micro-batches of a step", fix=fix)
        self._exit_weights = exit_weights
        self._micro_batches.append(torch.cat([loss.num_label_tokens.double().view(1), loss.exit_sums.double()]))
        return loss.weighted_sum / _NOMINAL_TOKENS

    def finish(
        self, module: LightningModule, optimizer: torch.optim.Optimizer, *, blocks: Sequence[nn.Module] = ()
    ) -> None:
        """Divide by the label tokens of all ranks, and log; called in Lightning's on_before_optimizer_step.

        The norms of the gradients of `blocks` are logged beside the whole one's. DivergenceError if an exit's loss or
        the gradient is not finite; it has not reached the weights.
        """
        trainer, exit_weights = module.trainer, self._exit_weights
        assert exit_weights is not None  # a step has a micro-batch
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)  # of the whole gradient, also if it is sharded
        totals = self._totals(module, norm)
        for name, logged in (trainer._results or {}).items():
            if any(own in name for own in _OF_A_STEP):  # or Lightning logs it again for exits that are off, and skips
                logged.reset()
        if self.guard.accepts(module, optimizer, totals=totals, grad_norm=norm):
            # Lightning divided by the micro-batches, DDP and FSDP by the ranks; undo both.
            undo = _NOMINAL_TOKENS * trainer.accumulate_grad_batches * trainer.world_size
            factor = undo / max(1.0, totals.num_label_tokens)
            for grad in grads:
                grad.mul_(factor)
            self._grad_norm = norm * factor
            if blocks and is_logged(trainer, trainer.global_step):
                log_gradient_norms(module, blocks, self._grad_norm, scale=_loss_scale(trainer, optimizer))
            weighted = sum(exit_weights[layer] * value for layer, value in totals.exit_losses.items())
            module.log(metric_names.TRAIN_LOSS, weighted, prog_bar=True)
            # Tensor-parallel ranks count the same rows.
            own_share = data_ranks(trainer).num_replicas / trainer.world_size
            module.log(metric_names.TRAIN_LABEL_TOKENS, totals.num_label_tokens * own_share)
            for exit_layer, value in totals.exit_losses.items():
                module.log(metric_names.of_exit(metric_names.TRAIN_EXIT_LOSS, exit_layer), value)
        if self.guard.skips:
            module.log(metric_names.SKIPPED_STEPS, float(self.guard.skipped_steps))
        self.clear()

    def _totals(self, module: LightningModule, grad_norm: Tensor) -> StepTotals:
        """Sum over micro-batches and ranks, all ranks together.

        Whether `grad_norm` is finite is asked of all ranks, since a replica can be damaged on one rank alone.
        """
        assert self._exit_weights is not None
        norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
        sums = torch.stack(self._micro_batches)
        local = torch.cat([sums.sum(dim=0), (~torch.isfinite(norm)).double().view(1)])
        num_tokens, *exit_sums, not_finite = module.trainer.strategy.reduce(local, reduce_op="sum").tolist()  # waits
        exits = zip(sorted(self._exit_weights), exit_sums, strict=True)
        losses = {exit_layer: total / max(1.0, num_tokens) for exit_layer, total in exits}
        return StepTotals(num_tokens, losses, grads_finite=not not_finite, own_sums_AE=sums[:, 1:])

    def clip(
        self, module: LightningModule, optimizer: torch.optim.Optimizer, clip_val: float | None, algorithm: str | None
    ) -> None:
        """Clip by the known norm. Lightning would refuse a fused optimizer here, even if no gradient is scaled.

        ConfigError for a fused optimizer under fp16 loss scaling, which unscales after the clipping.
        """
        if gradient_scaler(module.trainer) is not None:
            if clip_val and getattr(optimizer, "_step_supports_amp_scaling", False):
                allowed = "false with trainer.gradient_clip_val and precision 16-mixed"
                raise ConfigError("optimizer.init_args.fused", got=True, allowed=allowed)
        elif clip_val and algorithm in (None, "norm"):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_val, self._grad_norm)
            return
        module.clip_gradients(optimizer, clip_val, algorithm)


def _loss_scale(trainer: Trainer, optimizer: torch.optim.Optimizer) -> float:
    """What fp16 loss scaling still multiplies gradients by: a fused optimizer divides by it in its own step."""
    scaler = gradient_scaler(trainer)
    return scaler.get_scale() if scaler and getattr(optimizer, "_step_supports_amp_scaling", False) else 1.0
