"""What a module that trains does with held-out rows: losses by source, and hidden states by exit.

Shape legend: `B` sequences, `T` tokens, `D` model width, `V` vocabulary. Tested by tests/integration/test_monitors.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from transformers import PreTrainedConfig

from app import metric_names
from app.checkpoints.integrity import saved_step
from app.exits.quality import GroupedTokenLoss
from app.layerskip.early_exit_loss import IGNORE_INDEX
from app.model.early_exit import EarlyExitModel
from app.protocols import CorpusOwner
from app.training.batch import GivenBatch, check_batch, completed
from app.training.curriculum_host import CurriculumHost
from app.training.gradient_norms import is_logged


class EvaluationSteps(CurriculumHost):
    """Validates, tests and predicts without dropout, at every exit that is monitored; a subclass builds the model."""

    _network: EarlyExitModel
    _num_states = 0  # of each token, that are read from a batch

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config.num_hidden_layers)
        self.config = config
        self.source_loss: GroupedTokenLoss | None = None
        self._loops_checked: set[str] = set()  # the loops whose first batch was checked
        self._logged_step = 0  # where Lightning logs the losses of the latest step, and of a validation after it
        self._is_left_out: Callable[[str], bool] = lambda _: False

    def leave_out_of_logs(self, is_left_out: Callable[[str], bool]) -> None:
        self._is_left_out = is_left_out

    def log(self, name: str, value: Any, *args: Any, **settings: Any) -> None:
        """Log a metric; keep it from the loggers if a callback said so, and do so only at the steps that they get."""
        if self._is_left_out(name):
            if self.trainer.training and not is_logged(self.trainer, self._logged_step):
                return  # Lightning takes half a millisecond for it
            args, settings = args[:1], settings | {"logger": False}  # `logger` is the second of them
        super().log(name, value, *args, **settings)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._loops_checked.clear()
        self.source_loss = GroupedTokenLoss(len(self._corpus.source_names) if self._corpus else 1)

    def head(self, normed_BTD: Tensor) -> Tensor:
        """LM head alone: normed hidden states [B, T, D] -> logits [B, T, V]."""
        return self._network.head(normed_BTD)

    @property
    def _corpus(self) -> CorpusOwner | None:
        datamodule = getattr(self.trainer, "datamodule", None)
        return datamodule if isinstance(datamodule, CorpusOwner) else None

    def _checked(self, given: GivenBatch, loop: str) -> GivenBatch:
        """The batch with its defaults, after the first one of a loop was checked."""
        if loop not in self._loops_checked:
            self._loops_checked.add(loop)
            num_sources = len(self._corpus.source_names) if self._corpus else 1
            check_batch(given, config=self.config, num_sources=num_sources, num_states=self._num_states)
        return completed(given)

    def on_validation_start(self) -> None:
        if self.trainer.state.fn != TrainerFn.FITTING:
            self._log_at_step_of_checkpoint()
        elif not self.trainer.sanity_checking:
            # Log at the latest step, also if a resumed run begins with this validation.
            self.trainer.fit_loop.epoch_loop._batches_that_stepped = self._logged_step

    def on_test_start(self) -> None:
        self._log_at_step_of_checkpoint()

    def _log_at_step_of_checkpoint(self) -> None:
        """Log where the run did that wrote the weights; Lightning would do so at step 0."""
        if (path := self.trainer.ckpt_path) is not None and (step := saved_step(Path(path))) is not None:
            self.trainer.fit_loop.epoch_loop._batches_that_stepped = max(0, step - 1)

    def validation_step(self, given: GivenBatch, batch_idx: int) -> dict[str, Any]:
        """Measure the full model's loss by source; returns hidden states and labels for exit monitors."""
        return self._evaluate(self._checked(given, "validate"))

    def test_step(self, given: GivenBatch, batch_idx: int) -> dict[str, Any]:
        return self._evaluate(self._checked(given, "test"))

    def predict_step(self, given: GivenBatch, batch_idx: int) -> dict[str, Any]:
        """Score each row: its mean cross entropy in nats a token at each monitored exit, {exit_layer: [B]}."""
        batch = self._checked(given, "predict")
        labels = batch["labels"]
        counts = (labels != IGNORE_INDEX).sum(dim=1).clamp(min=1)
        loss_by_exit = {
            layer: self._network.token_losses(normed[None], labels[None])[0].sum(dim=1) / counts
            for layer, normed in self._evaluation_hidden(batch).items()
        }
        return {"loss_by_exit": loss_by_exit, "source": batch["source"]}

    def _evaluate(self, batch: GivenBatch) -> dict[str, Any]:
        hidden, labels = self._evaluation_hidden(batch), batch["labels"]
        losses = self._network.token_losses(hidden[self.num_layers][None], labels[None])[0]
        assert self.source_loss is not None
        self.source_loss.update(losses, labels != IGNORE_INDEX, batch["source"])
        return {"hidden_by_exit": hidden, "labels": labels}

    def _evaluation_hidden(self, batch: GivenBatch) -> dict[int, Tensor]:
        exits = {*self._monitored, self.num_layers}
        return self._network.hidden_by_exit(batch["input_ids"], batch["position_ids"], exits)

    def on_validation_epoch_end(self) -> None:
        self._log_losses("val", metric_names.VAL_LOSS)

    def on_test_epoch_end(self) -> None:
        self._log_losses("test", metric_names.TEST_LOSS)

    def _log_losses(self, stage: str, name: str) -> None:
        """Log the full model's loss over the tokens of all ranks, and each source's."""
        assert self.source_loss is not None
        total, by_source = self.source_loss.compute()
        self.source_loss.reset()
        self.log(name, total, prog_bar=True, sync_dist=True)  # the same on all ranks already
        names = self._corpus.source_names if self._corpus else ()
        for source, value in zip(names, by_source.reshape(-1), strict=False):  # torchmetrics squeezes a single group
            if torch.isfinite(value):  # a source without held-out rows has no loss
                self.log(metric_names.source_loss(stage, source), value, sync_dist=True)
