"""What `make bench-gpu` measures of training: steps under Lightning, plain and LayerSkip's, and FSDP2 on one device."""

from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader
from transformers import LlamaConfig

from app.training.module import LayerSkipModule
from app.training.strategy import MeshStrategy
from callbacks import EarlyExitCurriculum, LayerDropoutCurriculum
from tests.bench.gpu_decoding import Line
from tests.support.runs import make_trainer

_WARM_STEPS = 2


class _Clock(Callback):
    """When each step ended, the device included, and its loss."""

    def __init__(self) -> None:
        self.ended: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].item())
        self.ended.append(perf_counter())


def steps(
    config: LlamaConfig, *, rows: int, seq_len: int, num_steps: int, device: torch.device, folder: Path
) -> Iterator[Line]:
    """Time steps of bf16-mixed training on random tokens: plain, LayerSkip's, checkpointed, and sharded by FSDP2."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (rows * num_steps, seq_len + 1), generator=generator)
    data: Any = [{"input_ids": row[:-1], "labels": row[1:]} for row in tokens]
    ways: dict[str, tuple[bool, bool, Any]] = {
        "plain": (False, False, "auto"),
        "LayerSkip": (True, False, "auto"),
        "LayerSkip, activation checkpointing": (True, True, "auto"),
        "LayerSkip, FSDP2 on one device": (True, False, MeshStrategy()),
    }
    for way, (is_layerskip, checkpointing, strategy) in ways.items():
        clock = _Clock()
        curricula: list[Callback] = []
        if is_layerskip:
            curricula = [
                LayerDropoutCurriculum(max_dropout_rate=0.1),
                EarlyExitCurriculum(curriculum="rotational", rotation_interval=config.num_hidden_layers - 1),
            ]
        torch.manual_seed(0)
        module = LayerSkipModule(
            config=config,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
            lr_schedule="constant",
            activation_checkpointing=checkpointing,
        )
        trainer = make_trainer(
            folder,
            max_steps=num_steps,
            callbacks=[*curricula, clock],
            accelerator="gpu" if device.type == "cuda" else "cpu",
            precision="bf16-mixed",
            strategy=strategy,
        )
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trainer.fit(module, train_dataloaders=DataLoader(data, batch_size=rows), val_dataloaders=DataLoader(data[:1]))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # FSDP2's, which would make ranks of all that follows
        seconds = (clock.ended[-1] - clock.ended[_WARM_STEPS - 1]) / (num_steps - _WARM_STEPS)
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
        yield {
            "way": way,
            "tokens_per_second": rows * seq_len / seconds,
            "peak_gib": peak,
            "first_loss": clock.losses[0],
            "last_loss": clock.losses[-1],
        }
