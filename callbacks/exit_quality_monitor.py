"""Log how good every exit is at every validation. Tested by tests/integration/test_monitors.py."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from app import metric_names
from app.checkpoints.entries import SavedEntry
from app.errors import ConfigError, check_exits
from app.exits.predicted_speedup import predicted_speedup
from app.exits.quality import ExitQuality, ExitScore
from app.exits.report import exit_figure, exit_table, gap_figure
from app.protocols import DraftHost, ExitMonitorHost, FrozenModelHost
from app.tables import Table
from callbacks.tensorboard import write_figure


class ExitQualityMonitor(Callback):
    """Score exits on the validation (or test) rows with torchmetrics and keep their history.

    Checkpoints hold the history, so that the heat map of a resumed run is whole. With trainer.num_sanity_val_steps -1,
    which validates all rows before the first step, the history begins with what a pretrained model's exits know.

    Args:
        exit_layers: Exits to score, in blocks run; by default all of them, or where exits have blocks of their own,
            these and the full model. Each costs one unembedding.

    Raises:
        ConfigError: If an exit is not one of the model's.
    """

    def __init__(self, *, exit_layers: list[int] | None = None) -> None:
        self._wanted = exit_layers
        self._quality: ExitQuality | None = None
        # Both hold step -> exit_layer -> score: one of all validations in fits, the other of this process's latest one.
        self.history: dict[int, dict[int, ExitScore]] = {}
        self._latest: dict[int, dict[int, ExitScore]] = {}
        self._speedups: dict[int, float] = {}  # exit_layer -> what the cost model predicts, of the latest measurement

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, ExitMonitorHost):
            raise ConfigError("model", got=type(pl_module).__name__, allowed="a protocols.ExitMonitorHost")
        num_layers = self._num_layers = pl_module.num_layers
        exit_layers: Sequence[int] = self._wanted or range(1, num_layers + 1)
        if not self._wanted and isinstance(pl_module, FrozenModelHost) and pl_module.has_exit_blocks:
            exit_layers = [*pl_module.exit_sources, num_layers]
        check_exits(exit_layers, num_layers=num_layers)
        pl_module.monitor_exits(exit_layers)
        self._quality = ExitQuality(exit_layers, num_layers=num_layers).to(pl_module.device)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        assert self._quality is not None
        assert isinstance(pl_module, ExitMonitorHost)
        self._quality.to(pl_module.device)
        draft_ids = pl_module.draft_ids if isinstance(pl_module, DraftHost) else None
        self._quality.update(outputs["hidden_by_exit"], outputs["labels"], pl_module.head, draft_ids_V=draft_ids)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.on_validation_batch_end(trainer, pl_module, outputs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scores = self._log_scores(pl_module, "val")
        in_part = trainer.sanity_checking and trainer.num_sanity_val_steps != float("inf")
        if in_part or not scores:
            return
        self._latest = {trainer.global_step: scores}
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self.history[trainer.global_step] = scores
        write_figure(trainer, "val/exits", lambda: gap_figure(self.history))
        write_figure(trainer, "LayerSkip/exits", lambda: exit_figure(self.history))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if scores := self._log_scores(pl_module, "test"):
            self._latest = {trainer.global_step: scores}

    def _log_scores(self, pl_module: LightningModule, stage: str) -> dict[int, ExitScore]:
        assert self._quality is not None
        scores = self._quality.compute()
        self._quality.reset()
        self._speedups = {
            layer: predicted_speedup(
                score.agreement,
                exit_layer=layer,
                num_layers=self._num_layers,
                size=pl_module.draft_size(layer),
            )
            for layer, score in scores.items()
            if isinstance(pl_module, DraftHost) and layer < self._num_layers
        }
        for layer, score in scores.items():
            figures = {
                metric_names.EXIT_LOSS: score.loss,
                metric_names.EXIT_PERPLEXITY: score.perplexity,
                metric_names.EXIT_AGREEMENT: score.agreement,
                metric_names.EXIT_KL: score.kl,
                metric_names.EXIT_ACCEPTANCE: score.acceptance,
            }
            if layer in self._speedups:
                figures[metric_names.EXIT_PREDICTED_SPEEDUP] = self._speedups[layer]
            for name, value in figures.items():
                pl_module.log(metric_names.of_exit(f"{stage}/{name}", layer), value, sync_dist=True)
        return scores

    def state_dict(self) -> dict[str, Any]:
        return {"history": {step: {e: tuple(s) for e, s in scores.items()} for step, scores in self.history.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        history: dict[int, dict[int, ExitScore]] = {}
        saved = SavedEntry(state_dict, "callbacks", self.state_key)["history"]
        for step, scores in saved.mapping().items():
            scores.holding(step).count()
            history[step] = {}
            for exit_layer, score in scores.mapping().items():
                score.holding(exit_layer).count(low=1)
                figures = [figure.value for figure in score.sequence()]
                are_numbers = all(isinstance(figure, float) for figure in figures)  # or NaN: a run may have diverged
                if not are_numbers or len(figures) not in (2, 4):  # runs once measured loss and agreement alone
                    score.refuse("loss, agreement, KL and acceptance, as numbers")
                history[step][exit_layer] = ExitScore(*figures)
        self.history = history

    def report(self) -> Table | None:
        """Return every exit as this process last measured it, after a fit beside the run's first measurement."""
        if not self._latest:
            return None
        (step,) = self._latest
        shown = self.history if step in self.history else self._latest
        return exit_table(shown, num_layers=self._num_layers, speedups=self._speedups)
