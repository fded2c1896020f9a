"""Set exits and weights by the step (arXiv 2404.16710 section 4.1.2). Tested by test_curricula.py."""

from collections.abc import Sequence
from typing import get_args

from lightning.pytorch import Callback, LightningModule, Trainer

from app import metric_names
from app.errors import ConfigError, check_choice, check_early_exits, check_range, require_total_steps
from app.layerskip.distillation import RecipeLoss
from app.layerskip.exit_curricula import EXIT_CURRICULA, ExitCurriculum, exits_on
from app.layerskip.exit_weights import EXIT_WEIGHTS, ExitWeights, normalised_exit_weights
from app.protocols import EarlyExitHost


class EarlyExitCurriculum(Callback):
    """Set the exits C(t, l) and weights w(t, l) before every training batch; nothing to save.

    Args:
        curriculum: rotational, gradual (needs trainer.max_steps), fixed (`exit_layers` at every step; not the
            paper's) or none, which sets nothing: the full model alone is trained, or what another callback sets.
        rotation_interval: R of the rotational curriculum, in 1..num_layers.
        early_exit_scale: e_scale in [0, 1]; 0 leaves the full model alone.
        exit_weights: e(l): quadratic (the paper's), linear or uniform.
        always_on_last: Keep the full model in every step's loss (rotational).
        exit_layers: The early exits of the curriculum `fixed`, in blocks run: 1..num_layers - 1.
        loss: What early exits learn: cross_entropy (the paper's), the text; kl, the full model's distribution. The full
            model learns the text.

    Raises:
        ConfigError: On a value out of range, or a step that would have no exit of positive weight.
    """

    def __init__(
        self,
        *,
        curriculum: ExitCurriculum = "none",
        rotation_interval: int = 8,
        early_exit_scale: float = 0.2,
        exit_weights: ExitWeights = "quadratic",
        always_on_last: bool = True,
        exit_layers: Sequence[int] = (),
        loss: RecipeLoss = "cross_entropy",
    ) -> None:
        check_choice("curriculum", curriculum, EXIT_CURRICULA)
        check_choice("exit_weights", exit_weights, EXIT_WEIGHTS)
        check_choice("loss", loss, get_args(RecipeLoss))
        check_range("rotation_interval", rotation_interval, low=1)
        check_range("early_exit_scale", early_exit_scale, low=0, high=1)
        self.curriculum, self.rotation_interval = curriculum, rotation_interval
        self.early_exit_scale, self.exit_weights, self.loss = early_exit_scale, exit_weights, loss
        self.always_on_last, self.exit_layers = always_on_last, tuple(exit_layers)
        if (curriculum == "fixed") != bool(self.exit_layers):
            allowed = "some layers with curriculum fixed, none with any other"
            raise ConfigError("exit_layers", got=f"{list(self.exit_layers)} with {curriculum}", allowed=allowed)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, EarlyExitHost):
            raise ConfigError("model", got=type(pl_module).__name__, allowed="a protocols.EarlyExitHost")
        if stage != "fit":
            return
        num_layers = pl_module.num_layers
        if self.curriculum == "gradual":
            require_total_steps(trainer.max_steps, field="curriculum", got=self.curriculum)
        check_early_exits(self.exit_layers, num_layers=num_layers, instead="set curriculum none")
        if self.curriculum == "rotational":
            if not self.always_on_last and trainer.world_size > 1:  # blocks above the highest exit have no gradient
                raise ConfigError("always_on_last", got=False, allowed="true on more than one device")
            check_range("rotation_interval", self.rotation_interval, low=1, high=num_layers)
            for step in range(self.rotation_interval):
                try:
                    self._weights(trainer, step, num_layers)
                except ValueError as error:
                    fix = f"step {step} would have {error}; set it to true"
                    raise ConfigError("always_on_last", got=False, allowed="true here", fix=fix) from error

    def _weights(self, trainer: Trainer, step: int, num_layers: int) -> dict[int, float]:
        exit_layers = exits_on(
            step,
            curriculum=self.curriculum,
            num_layers=num_layers,
            rotation_interval=self.rotation_interval,
            always_on_last=self.always_on_last,
            total_steps=trainer.max_steps if trainer.max_steps > 0 else None,
            exit_layers=self.exit_layers,
        )
        return normalised_exit_weights(
            exit_layers, num_layers=num_layers, early_exit_scale=self.early_exit_scale, kind=self.exit_weights
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        assert isinstance(pl_module, EarlyExitHost)
        if self.curriculum != "none":
            weights = self._weights(trainer, trainer.global_step, pl_module.num_layers)
            pl_module.set_exit_weights(weights, distil=self.loss == "kl")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Log the weights that the module used, whoever set them."""
        assert isinstance(pl_module, EarlyExitHost)
        weights = pl_module.exit_weights
        pl_module.log(metric_names.NUM_EXITS_ON, len(weights))
        for exit_layer in range(1, pl_module.num_layers + 1):  # also 0 of exits that are off: Lightning repeats values
            pl_module.log(
                metric_names.of_exit(metric_names.TRAIN_EXIT_WEIGHT, exit_layer), weights.get(exit_layer, 0.0)
            )
