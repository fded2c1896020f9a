"""A run in miniature: a small corpus, a tiny model, and the real module, datamodule and callbacks."""

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from app.checkpoints.checkpoint_io import AtomicCheckpointIO
from app.cli.main import main
from app.cli.train import LayerSkipCLI
from app.training.module import LayerSkipModule
from callbacks import EarlyExitCurriculum, LayerDropoutCurriculum
from datamodules import Source, TextCodeDataModule
from datamodules.streaming.loader import STATE_KEY
from tests.support.tiny_models import tiny_config

NUM_LAYERS = 4


def write_corpus(folder: Path, *, files: int = 12) -> Path:
    """Small files of code and prose under `folder`; any number of ranks may write and read them at the same time."""
    folder.mkdir(parents=True, exist_ok=True)
    for idx in range(files):
        lines = [f"def function_{idx}_{line}(x):\n    return x * {line} + {idx * line}\n" for line in range(12)]
        file = folder / f"module_{idx:02d}.py"
        if not file.exists():  # to truncate it would change it under a rank that looks at sizes
            unfinished = folder.with_name(f"{folder.name}-{os.getpid()}-{idx}")
            unfinished.write_text("\n".join(lines))
            unfinished.rename(file)
    return folder


class UnequalRows(TextCodeDataModule):
    """One row in every micro-batch of lane 1; of two ranks with two lanes, in every one of rank 1."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        fewer = STATE_KEY in batch and batch[STATE_KEY][0] == 1
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        return {name: column[:1] for name, column in batch.items()} if fewer else batch


def make_data(
    root: Path, *, kind: type[TextCodeDataModule] = TextCodeDataModule, **settings: Any
) -> TextCodeDataModule:
    corpus = write_corpus(root / "corpus")
    defaults: dict[str, Any] = {
        "sources": {"code": Source(kind="files", path=str(corpus))},
        "seq_len": 24,
        "batch_size": 4,
        "vocab_size": 300,
        "validation_share": 0.2,
        "validation_rows": 8,
        "cache_dir": str(root / "cache"),
    }
    return kind(**(defaults | settings))


def make_module(**settings: Any) -> LayerSkipModule:
    config = tiny_config(num_layers=NUM_LAYERS, vocab_size=300, max_length=128)
    defaults: dict[str, Any] = {
        "config": config,
        "optimizer": lambda params: torch.optim.AdamW(params, lr=1e-2),
        "lr_schedule": "constant",
    }
    return LayerSkipModule(**(defaults | settings))


def curricula(*, curriculum: str = "rotational", max_dropout_rate: float = 0.5) -> list[Callback]:
    return [
        LayerDropoutCurriculum(max_dropout_rate=max_dropout_rate),
        EarlyExitCurriculum(curriculum=curriculum, rotation_interval=3),  # type: ignore[arg-type]
    ]


class Recorder(Callback):
    """What every step saw and did."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append(
            {
                "step": trainer.global_step,
                "rows": batch["input_ids"].sum(dim=1).tolist(),
                "loss": outputs["loss"].item(),
                "exits": tuple(pl_module.exit_weights.items()),
                "dropped": pl_module.dropped_shares,
            }
        )


def make_trainer(root: Path, *, max_steps: int, callbacks: list[Callback], **settings: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any("Checkpoint" in type(callback).__name__ for callback in callbacks),
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "use_distributed_sampler": False,
        "inference_mode": False,
        "plugins": [AtomicCheckpointIO()],
    }
    return Trainer(default_root_dir=root, max_steps=max_steps, callbacks=callbacks, **(defaults | settings))


def write_trained(root: Path, *, max_steps: int) -> Path:
    """A folder with a corpus and `model.ckpt`, the checkpoint of a small model that was trained on it so long."""
    saver = ModelCheckpoint(dirpath=root, filename="model")
    make_trainer(root, max_steps=max_steps, callbacks=[saver]).fit(make_module(), datamodule=make_data(root))
    return root


class Built(LayerSkipCLI):
    """The verb up to where it would run."""

    def _check_checkpoints(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def cli(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    """Run the command line in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["layerskip", *args])
    previous = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        return main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        for name in ("app", "callbacks", "datamodules"):  # their handlers hold this test's stderr
            logging.getLogger(name).handlers.clear()
            logging.getLogger(name).propagate = True


TINY_EXIT_BLOCKS = f"""
config: [{Path(__file__).parents[2]}/configs/exit_blocks.yaml]
data:
  init_args:
    corpus: {{init_args: {{seq_len: 32, validation_share: 0.3, validation_rows: 4}}}}
trainer:
  accelerator: cpu
  enable_progress_bar: false
  callbacks:
    - class_path: callbacks.ThroughputMonitor
    - class_path: callbacks.LastCheckpoint
      init_args: {{every_n_train_steps: 2}}
"""


def adapt_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `layerskip adapt` run its verbs in this process, which has loaded what they need."""

    def run(command: list[str], *, check: bool) -> subprocess.CompletedProcess[str]:
        assert (command[1:3], check) == (["-m", "app"], False)
        return subprocess.CompletedProcess(command, cli(monkeypatch, *command[3:]))

    monkeypatch.setattr("app.cli.adaptation.subprocess", SimpleNamespace(run=run))


def measure_costs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `benchmark` and `tune` measure the costs of decoding seldom, which is most of their work on tiny models."""
    for times in (
        "benchmark.benchmark._COST_MOMENTS",
        "benchmark.benchmark._COST_REPEATS",
        "tuning.tune._COST_REPEATS",
    ):
        monkeypatch.setattr(f"app.{times}", 1)
