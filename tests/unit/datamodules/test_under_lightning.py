"""What Lightning does to the loaders: when it asks for them, and where a resumed run goes on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from app.errors import ConfigError
from tests.unit.datamodules.corpora import small_datamodule

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # two rows a batch need none
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),  # Lightning 2.6 on torch 2.13
]


class Recorder(LightningModule):
    """Learns nothing and remembers which rows it was given."""

    def __init__(self, *, ask_for_steps: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.ask_for_steps = ask_for_steps
        self.trained: list[Any] = []
        self.validated: list[Any] = []

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        self.trained.append(batch["input_ids"].tolist())
        return self.weight.sum()

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        self.validated.append(batch["input_ids"].tolist())

    def predict_step(self, batch: dict[str, Tensor]) -> Any:
        return batch["input_ids"].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.ask_for_steps:  # Lightning then makes the loader before it restores the step
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveEveryStep(Callback):
    """Where ModelCheckpoint saves, but without a state that wants the same folder again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        path = self.folder / f"{trainer.global_step}.ckpt"
        if not path.exists() and trainer.global_step > 0:
            trainer.save_checkpoint(path)


def make_trainer(folder: Path, **settings: Any) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        accumulate_grad_batches=2,
        **settings,
    )


def fit(folder: Path, corpus: Path, *, steps: int, ask_for_steps: bool, workers: int, **settings: Any) -> Recorder:
    """Train for `steps` steps, with a checkpoint after each; `resume` names one to go on from."""
    resume = settings.pop("resume", None)
    recorder = Recorder(ask_for_steps=ask_for_steps)
    epochs = 1000 if ask_for_steps else -1
    if not isinstance(settings.get("limit_train_batches"), int):  # a stream without epochs
        settings |= {"val_check_interval": 4, "check_val_every_n_epoch": None}
    trainer = make_trainer(folder, max_steps=steps, max_epochs=epochs, callbacks=[SaveEveryStep(folder)], **settings)
    datamodule = small_datamodule(corpus, num_workers=workers, batch_size=32, validation_rows=2)
    trainer.fit(recorder, datamodule=datamodule, ckpt_path=resume)
    assert trainer.global_step == steps
    return recorder


@pytest.mark.parametrize(
    ("ask_for_steps", "workers", "limit"), [(False, 0, 1.0), (True, 0, 5), (True, 2, 4), (True, 2, 1.0)]
)
def test_a_resumed_run_trains_on_the_rows_an_uninterrupted_one_does(
    tmp_path: Path, corpus: Path, ask_for_steps: bool, workers: int, limit: float
) -> None:
    settings: dict[str, Any] = {"ask_for_steps": ask_for_steps, "workers": workers, "limit_train_batches": limit}
    whole = fit(tmp_path / "whole", corpus, steps=11, **settings).trained
    for step in (1, 2, 3) if limit == 5 else (3,):
        checkpoint = tmp_path / "whole" / f"{step}.ckpt"
        resumed = fit(tmp_path / "resumed", corpus, steps=11, resume=checkpoint, **settings).trained
        assert resumed == whole[-len(resumed) :]
        assert len(resumed) >= 11 - step
        if limit != 5:  # where an epoch's last step is a shorter one
            assert len(resumed) == 2 * (11 - step)


def test_validation_and_prediction_see_the_held_out_rows_in_order(tmp_path: Path, corpus: Path) -> None:
    datamodule = small_datamodule(corpus, batch_size=3, validation_rows=4)
    recorder = Recorder(ask_for_steps=False)
    trainer = make_trainer(tmp_path)
    trainer.validate(recorder, datamodule=datamodule, verbose=False)
    predicted = trainer.predict(recorder, datamodule=datamodule)
    expected = [batch["input_ids"].tolist() for batch in datamodule.val_dataloader()]
    assert recorder.validated == expected
    assert predicted == expected


def test_a_checkpoint_of_another_order_stops_fit_but_not_validate(tmp_path: Path, corpus: Path) -> None:
    settings: dict[str, Any] = {"ask_for_steps": False, "workers": 0}
    fit(tmp_path, corpus, steps=1, **settings)
    checkpoint = tmp_path / "1.ckpt"
    other = small_datamodule(corpus, num_workers=0, batch_size=31)
    recorder = Recorder(ask_for_steps=False)
    make_trainer(tmp_path).validate(recorder, datamodule=other, ckpt_path=checkpoint, verbose=False)
    with pytest.raises(ConfigError, match="batch_size: got 31, allowed 32"):
        make_trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(recorder, datamodule=other, ckpt_path=checkpoint)
