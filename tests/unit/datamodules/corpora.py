"""Small corpora on disk, datamodules over them, their batches, and a trainer with what the data layer reads alone."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from datamodules import Source, TextCodeDataModule

Batches = list[dict[str, Tensor]]
WORDS = ("the", "exit", "layer", "drops", "a", "block", "and", "head", "reads", "def", "return", "self", "for", "in")


def write_files(folder: Path, *, count: int, seed: int, words: int = 60) -> Path:
    """`count` distinct files of about `words` words."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        text = " ".join(rng.choice(WORDS, size=int(rng.integers(words // 2, 2 * words))))
        (folder / f"{seed}-{index:03}.txt").write_text(f"{seed} {index} {text}\n", encoding="utf-8")
    return folder


def two_sources(folder: Path, *, count: int = 60) -> list[Source]:
    code = write_files(folder / "code", count=count, seed=1)
    text = write_files(folder / "text", count=count, seed=2)
    return [
        Source(name="code", kind="files", path=str(code), weight=3.0),
        Source(name="text", kind="files", path=str(text), weight=1.0),
    ]


def by_name(sources: list[Source]) -> dict[str, Source]:
    return {source.name: source for source in sources}


def small_datamodule(folder: Path, **settings: Any) -> TextCodeDataModule:
    defaults: dict[str, Any] = {
        "seq_len": 16,
        "batch_size": 2,
        "validation_share": 0.2,
        "vocab_size": 300,
        "cache_dir": str(folder / "cache"),
    }
    if "sources" not in settings:
        defaults["sources"] = by_name(two_sources(folder))
    return TextCodeDataModule(**(defaults | settings))


def fake_trainer(
    *,
    step: int = 0,
    accumulate: int = 1,
    rank: int = 0,
    num_replicas: int = 1,
    fn: TrainerFn = TrainerFn.FITTING,
    limit: int | float = 1.0,
    use_distributed_sampler: bool = False,
    overfit_batches: float = 0.0,
    max_steps: int = 100,
    val: int | float = 10,
) -> Any:
    return SimpleNamespace(
        global_step=step,
        accumulate_grad_batches=accumulate,
        distributed_sampler_kwargs={"rank": rank, "num_replicas": num_replicas} if num_replicas > 1 else None,
        limit_train_batches=limit,
        overfit_batches=overfit_batches,
        max_steps=max_steps,
        val_check_interval=val,
        limit_val_batches=1.0,
        callbacks=[],
        state=SimpleNamespace(fn=fn),
        _accelerator_connector=SimpleNamespace(use_distributed_sampler=use_distributed_sampler),
    )


def same(left: Batches, right: Batches) -> bool:
    return len(left) == len(right) and all(
        torch.equal(mine[name], other[name]) for mine, other in zip(left, right, strict=True) for name in mine
    )
