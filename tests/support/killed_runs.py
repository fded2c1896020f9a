"""`layerskip fit` in processes that are forked, killed at any moment and gone on with: nothing is imported twice."""

import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import yaml
from torch import Tensor

from app.training.module import LayerSkipModule
from tests.support.runs import cli
from tests.support.stream_runs import write_config, write_sources

STEPS = 30
_WAIT_SECONDS = 240  # several times what a busy machine takes
_MODEL_CHECKPOINT = "lightning.pytorch.callbacks.ModelCheckpoint"
_BEST = {"filename": "best", "monitor": "val/loss", "auto_insert_metric_name": False, "enable_version_counter": False}
_EVERY = {"every_n_train_steps": 3}
_SAVERS: dict[str, dict[str, Any]] = {
    "ours": {"class_path": "callbacks.LastCheckpoint", "init_args": _EVERY},
    "Lightning's": {
        "class_path": _MODEL_CHECKPOINT,
        "init_args": _EVERY | {"save_top_k": 0, "save_last": True, "enable_version_counter": False},
    },
}


def write_accumulating_config(folder: Path, *, accumulate: int, curriculum: str, num_workers: int, saver: str) -> Path:
    """Of a run of three sources that validates within steps and between them, but not at its end."""
    path = write_config(
        folder,
        write_sources(folder),
        max_steps=STEPS,
        checkpoint_every=3,
        num_workers=num_workers,
        validation_rows=4,
    )
    config = yaml.safe_load(path.read_text())
    config["early_exit"]["curriculum"] = curriculum
    config["layer_dropout"]["time_scale"] = "exponential"
    config["trainer"] |= {
        "accumulate_grad_batches": accumulate,
        "val_check_interval": 7,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 1.0,
        "callbacks": [_SAVERS[saver], {"class_path": _MODEL_CHECKPOINT, "init_args": _BEST}],
    }
    path.write_text(json.dumps(config))
    return path


def fit(config: Path, name: str, *options: str, kill_after: tuple[int, float] | None = None) -> int:
    """Run `fit`, and kill -9 it and its data workers, if asked to.

    Args:
        config: As `write_accumulating_config` wrote it.
        name: Of the run.
        options: More of the command line's.
        kill_after: How many micro-batches of this process, and how many seconds behind the latest of these.

    Returns:
        The exit status; -9 if the run did not end before.
    """
    told = config.parent / f"{name}.jsonl"
    before = len(_lines(told))
    arguments = ("fit", "--config", str(config), "--trainer.logger.init_args.name", name, *options)
    child = mp.get_context("fork").Process(target=_fit, args=(told, arguments))
    child.start()
    assert child.pid is not None
    deadline = time.monotonic() + _WAIT_SECONDS
    try:
        if kill_after is not None:
            micro_batches, seconds = kill_after
            while child.is_alive() and len(_lines(told)) < before + micro_batches:
                assert time.monotonic() < deadline
                time.sleep(0.002)
            time.sleep(seconds)
        else:
            child.join(timeout=_WAIT_SECONDS)
    finally:
        if child.is_alive():
            os.killpg(child.pid, signal.SIGKILL)
        child.join()
    assert child.exitcode is not None
    return child.exitcode


def _fit(told: Path, arguments: tuple[str, ...]) -> None:
    os.setpgrp()  # its data workers are killed with it
    torch.set_num_threads(1)
    output = os.open(told.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    sys.stdout = sys.stderr = os.fdopen(output, "w", buffering=1)
    file = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def tell(module: LayerSkipModule, kind: str, **values: Any) -> None:
        at = {"step": module.global_step, "micro_batch": module.trainer.fit_loop.epoch_loop.total_batch_idx}
        os.write(file, (json.dumps({"kind": kind, **at, **values}) + "\n").encode())

    train, validated = LayerSkipModule.training_step, LayerSkipModule.on_validation_epoch_end

    def training_step(self: LayerSkipModule, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = train(self, batch, batch_idx)
        rows = batch["input_ids"].sum(dim=1).tolist()
        tell(self, "train", loss=loss.item(), rows=rows, exits=self.exit_weights, dropped=self.dropped_shares)
        return loss

    def on_validation_epoch_end(self: LayerSkipModule) -> None:
        assert self.source_loss is not None
        tell(self, "validate", loss=self.source_loss.compute()[0].item())
        validated(self)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LayerSkipModule, "training_step", training_step)
        patched.setattr(LayerSkipModule, "on_validation_epoch_end", on_validation_epoch_end)
        status = cli(patched, *arguments)
    os._exit(status)


def told(config: Path, name: str) -> Counter[str]:
    """What all processes of a run told of their micro-batches and validations: each line, and how often."""
    return Counter(_lines(config.parent / f"{name}.jsonl"))


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def printed(config: Path, name: str) -> str:
    """What all processes of a run printed."""
    return (config.parent / f"{name}.txt").read_text()


def end(config: Path, name: str) -> dict[str, Any]:
    """What a run left: of its last checkpoint all but paths, and its best weights."""
    folder = config.parent / name / "checkpoints"
    last, best = (torch.load(folder / f"{kind}.ckpt", weights_only=True) for kind in ("last", "best"))
    names = ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "TextCodeDataModule")
    kept = {name: last[name] for name in names}
    kept["batches"] = last["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    return kept | {"best_step": best["global_step"], "best": best["state_dict"]}


def same(one: Any, other: Any) -> bool:
    """Whether nested values are equal, tensors bit for bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
