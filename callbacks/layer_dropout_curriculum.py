"""Set p(l, t) by the step (arXiv 2404.16710 section 4.1.1). Tested by test_curricula.py."""

from lightning.pytorch import Callback, LightningModule, Trainer

from app import metric_names
from app.errors import ConfigError, check_choice, check_range, require_total_steps
from app.layerskip.schedules import DEPTH_SCALES, TIME_SCALES, DepthScale, TimeScale, dropout_rates, needs_total_steps
from app.protocols import LayerDropoutHost


class LayerDropoutCurriculum(Callback):
    """Set p(l, t) = S(t) D(l) p_max before every training batch; a pure function of the step, nothing to save.

    Args:
        max_dropout_rate: p_max in [0, 1); 0 sets nothing, so no block is dropped unless another callback says so.
        depth_scale: D(l): exponential (the paper's), linear or uniform.
        time_scale: S(t): constant (fine-tuning, continual pretraining), exponential (from scratch), linear or
            decreasing; all but constant need trainer.max_steps.
        rescale: Multiply kept residuals by 1/(1 - p); the paper does not.

    Raises:
        ConfigError: On a value out of range, or a time scale in an unbounded run.
    """

    def __init__(
        self,
        *,
        max_dropout_rate: float = 0.0,
        depth_scale: DepthScale = "exponential",
        time_scale: TimeScale = "constant",
        rescale: bool = False,
    ) -> None:
        check_range("max_dropout_rate", max_dropout_rate, low=0, high=1, high_open=True)
        check_choice("depth_scale", depth_scale, DEPTH_SCALES)
        check_choice("time_scale", time_scale, TIME_SCALES)
        self.max_dropout_rate, self.rescale = max_dropout_rate, rescale
        self.depth_scale, self.time_scale = depth_scale, time_scale

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, LayerDropoutHost):
            raise ConfigError("model", got=type(pl_module).__name__, allowed="a protocols.LayerDropoutHost")
        if stage == "fit" and self.max_dropout_rate > 0 and needs_total_steps(self.time_scale):
            require_total_steps(trainer.max_steps, field="time_scale", got=self.time_scale)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        assert isinstance(pl_module, LayerDropoutHost)
        if self.max_dropout_rate == 0:
            return
        rates = dropout_rates(
            trainer.global_step,
            num_layers=pl_module.num_layers,
            max_dropout_rate=self.max_dropout_rate,
            depth=self.depth_scale,
            time=self.time_scale,
            total_steps=trainer.max_steps if trainer.max_steps > 0 else None,
        )
        pl_module.set_dropout_rates(rates, rescale=self.rescale)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Log the rates that the module used, whoever set them."""
        assert isinstance(pl_module, LayerDropoutHost)
        in_use = pl_module.dropout_rates
        pl_module.log(metric_names.DROPOUT_MEAN_RATE, sum(in_use) / len(in_use))
        pl_module.log(metric_names.DROPOUT_LAST_RATE, in_use[-1])
        for block, rate in enumerate(in_use[:-1], start=1):
            pl_module.log(metric_names.of_block(metric_names.DROPOUT_RATE, block), rate)
