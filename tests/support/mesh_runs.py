"""The same training run on any number of ranks, to be compared with one process: same rows, masks and exits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import Strategy

from app import metric_names
from callbacks import EarlyExitCurriculum, LayerDropoutCurriculum
from tests.support.distributed import Collectives, is_sharded, whole_weights
from tests.support.runs import NUM_LAYERS, Recorder, make_data, make_module, make_trainer
from tests.support.tiny_models import tiny_config

STEPS = 3
MICRO_BATCHES = 4  # of a step, over all data-parallel ranks


class Watch(Callback):
    """The loss of every step, and the collectives of every micro-batch's forward and backward."""

    def __init__(self, *, counts: bool) -> None:
        self._counts = counts
        self.losses: list[float] = []
        self.collectives: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._counter = Collectives()
        if self._counts:
            self._counter.__enter__()

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if self._counts:
            self._counter.__exit__(None, None, None)
        self.collectives.append(self._counter.count)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if len(self.losses) < trainer.global_step:
            self.losses.append(trainer.callback_metrics[metric_names.TRAIN_LOSS].item())


def train(
    root: Path,
    *,
    ranks: int = 1,
    replicas: int = 1,
    strategy: Strategy | str = "auto",
    curriculum: str = "rotational",
    dropout: float = 0.9,  # of four samples the last block often keeps none
    tied: bool = True,
    precision: str = "32-true",
    extra: tuple[Callback, ...] = (),
    steps: int = STEPS,
    **module: Any,
) -> dict[str, Any]:
    """What comes out of some steps of MICRO_BATCHES micro-batches, spread over `replicas` of the `ranks`."""
    recorder = Recorder()
    watch = Watch(counts=not module.get("compile_blocks"))  # torch.compile wants no mode around it
    exits = EarlyExitCurriculum(
        curriculum=curriculum,  # type: ignore[arg-type]
        rotation_interval=3,
        exit_layers=(2,) if curriculum == "fixed" else (),
    )
    trainer = make_trainer(
        root,
        max_steps=steps,
        callbacks=[LayerDropoutCurriculum(max_dropout_rate=dropout), exits, recorder, watch, *extra],
        devices=ranks,
        strategy=strategy,
        precision=precision,
        accumulate_grad_batches=MICRO_BATCHES // replicas,
        gradient_clip_val=0.5,
        log_every_n_steps=1,
        limit_val_batches=1.0,
        check_val_every_n_epoch=None,
        val_check_interval=steps * (MICRO_BATCHES // replicas),
    )
    defaults: dict[str, Any] = {
        "config": tiny_config(num_layers=NUM_LAYERS, vocab_size=300, max_length=128, tied=tied),
        # SGD, since Adam's first steps are signs: they would blow rounding up
        "optimizer": lambda params: torch.optim.SGD(params, lr=0.3),
    }
    made = make_module(**(defaults | module))
    trainer.fit(made, datamodule=make_data(root, num_lanes=MICRO_BATCHES))
    return {
        "sharded": sum(map(is_sharded, made.parameters())),
        "weights": whole_weights(made),
        "losses": watch.losses,
        "metrics": {name: value.item() for name, value in trainer.callback_metrics.items()},
        "dropped": [step["dropped"] for step in recorder.steps],
        "rows": [step["rows"] for step in recorder.steps],
        "collectives": watch.collectives,
    }


def assert_equal(ours: dict[str, Any], expected: dict[str, Any], *, tolerance: float = 1e-6) -> None:
    """Losses of all steps, the last gradient, held-out loss and final weights are the same up to rounding."""
    assert ours["losses"] == pytest.approx(expected["losses"], abs=tolerance * 10)
    for name, value in expected["metrics"].items():
        if "loss" in name or metric_names.GRADIENT_NORM in name:
            assert ours["metrics"][name] == pytest.approx(value, abs=tolerance * 10), name
    for name, value in expected["weights"].items():
        assert abs(ours["weights"][name] - value).max() < tolerance, name
