"""A module that trains in a moment and lends its model for decoding, and a quiet trainer for it."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader

from app.spans.decoder import SpanDecoder
from tests.support.tiny_models import tiny_llama


class DecodingModule(LightningModule):
    """Its training draws from the global generator where `attention_dropout` is above 0."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__()
        self.model = tiny_llama(**sizes).train()
        self.config: Any = self.model.config
        self.modes_seen: list[bool] = []

    @property
    def num_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    def exitable_decoder(self) -> SpanDecoder:
        return SpanDecoder(self.model)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.modes_seen.append(self.model.training)
        return self.model(batch, labels=batch).loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        pass

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def random_rows(count: int, *, vocab_size: int) -> DataLoader[torch.Tensor]:
    rows = torch.randint(0, vocab_size, (count, 9), generator=torch.Generator().manual_seed(0))
    return DataLoader(rows, batch_size=2)


class RandomRows(LightningDataModule):
    """Random rows in all loops; a subclass says what is decoded."""

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        return random_rows(12, vocab_size=61)

    def val_dataloader(self) -> DataLoader[torch.Tensor]:
        return self.train_dataloader()

    test_dataloader = val_dataloader


def train_with_and_without(folder: Path, callback: Callback, data: LightningDataModule, **sizes: Any) -> None:
    """Assert that a fit with the callback leaves weights and random generator as one without it does, bit for bit."""
    weights, generators = [], []
    for callbacks in ([], [callback]):
        torch.manual_seed(5)
        module = DecodingModule(**sizes)
        quiet_trainer(folder, *callbacks, max_epochs=1, val_check_interval=2).fit(module, datamodule=data)
        weights.append(module.state_dict())
        generators.append(torch.get_rng_state())
        assert module.modes_seen == [True] * 6
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert torch.equal(*generators)


def quiet_trainer(folder: Path, *callbacks: Callback | None, **settings: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return Trainer(callbacks=[each for each in callbacks if each is not None], **(defaults | settings))
