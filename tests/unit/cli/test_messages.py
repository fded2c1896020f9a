"""What a user reads where jsonargparse, Lightning or torch refuses a setting."""

from unittest.mock import patch

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, StochasticWeightAveraging
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from app.checkpoints.checkpoint_io import AtomicCheckpointIO
from app.checkpoints.sharded import ShardedCheckpoints
from app.cli.messages import user_message
from app.errors import CheckpointError, ConfigError
from datamodules.loading.datamodule import check_end
from tests.support.runs import cli

DATA = ("--data", "TextCodeDataModule", "--data.sources", '{"code": {"kind": "stdlib_code"}}')


def _fails_in_step(kind: type[torch.optim.Optimizer]) -> BaseException:
    weight = nn.Parameter(torch.zeros(2))
    weight.sum().backward()
    with pytest.raises((RuntimeError, AttributeError)) as caught:
        kind([weight]).step()  # type: ignore[call-arg]
    return caught.value


class _OwnOptimizer(torch.optim.SGD):
    def step(self, closure=None):  # type: ignore[no-untyped-def]
        return self.absent


def test_a_class_of_lightnings_or_torchs_is_named_by_its_setting_and_own_code_keeps_its_traceback() -> None:
    message = user_message(_fails_in_step(torch.optim.SparseAdam))
    assert (
        message
        == "model.optimizer (SparseAdam): SparseAdam does not support dense gradients, please consider Adam instead"
    )
    assert user_message(_fails_in_step(_OwnOptimizer)) is None
    with pytest.raises(Exception, match="mode") as caught:
        EarlyStopping("val/loss", mode="foo")
    assert user_message(caught.value) == "trainer.callbacks (EarlyStopping): `mode` can be min, max, got foo"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit_val_batches": -1}, "trainer.limit_val_batches: got -1; You have passed invalid value -1 for"),
        ({"val_check_interval": 0.5, "check_val_every_n_epoch": None}, "trainer.val_check_interval: got 0.5; `val"),
        ({"max_time": "foo"}, "trainer.max_time: got 'foo'; `Timer(duration='foo')` is not a valid duration"),
        ({"gradient_clip_algorithm": "foo"}, "trainer.gradient_clip_algorithm: got 'foo'; "),
        ({"profiler": "foo"}, "trainer.profiler: got 'foo'; "),
        ({"strategy": "foo"}, "trainer.strategy: got 'foo'; You selected an invalid strategy name"),
        ({"precision": "transformer-engine"}, "trainer.precision: got 'transformer-engine'; Requirement "),
        ({"accelerator": "tpu"}, "trainer.accelerator: got 'tpu'; Requirement 'torch_xla"),
        ({"accelerator": "foo"}, "trainer.accelerator: got 'foo'; You selected"),
        ({"barebones": True, "logger": True}, "trainer.barebones: got True; `Trainer(barebones=True, logger="),
        (
            {"callbacks": [Callback(), EarlyStopping("a"), EarlyStopping("a")]},
            "trainer.callbacks: got more than one EarlyStopping, allowed",
        ),
    ],
)
def test_what_the_trainer_refuses_is_told_with_the_argument_and_its_value(settings, message) -> None:
    with pytest.raises(Exception, match=r".") as caught:
        Trainer(**settings)
    assert (user_message(caught.value) or "").startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["LearningRateMonitor", "--trainer.callbacks.logging_interval", "foo"],
         "trainer.callbacks.logging_interval: got foo, allowed step | epoch\n"),
        (['{"foo": 3}'], "trainer.callbacks: got {'foo': 3}, allowed list[Callback] | Callback\n"),
        (["mine.Cb"], "add --allowed_classes+ mine to the command line, at every start\n"),
    ],
)  # fmt: skip
def test_of_a_union_the_alternative_that_was_meant_is_told(monkeypatch, capsys, arguments, message) -> None:
    assert cli(monkeypatch, "fit", *DATA, "--trainer.callbacks", *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_default_that_is_an_enum_is_written_by_its_value(monkeypatch, capsys) -> None:
    timer = ["--trainer.callbacks", "Timer", "--trainer.callbacks.duration", "01:00:00:00"]
    assert cli(monkeypatch, "fit", *DATA, *timer, "--print_config") == 0
    (callback,) = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    assert callback["init_args"]["interval"] == "step"


def test_a_stream_may_be_validated_by_the_clock() -> None:
    check_end(Trainer(max_steps=1, val_check_interval="00:00:00:01", logger=False))
    with pytest.raises(ConfigError, match=r"got 0\.5, allowed a number of batches"):
        check_end(Trainer(max_steps=1, val_check_interval=0.5, logger=False))


def test_weights_are_not_averaged_by_the_epochs_that_a_stream_has_not() -> None:
    settings = {"max_steps": 1, "limit_val_batches": 0, "logger": False}
    averaging = StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)
    with pytest.raises(ConfigError, match="got 'StochasticWeightAveraging', allowed what averages by steps"):
        check_end(Trainer(callbacks=averaging, **settings))
    check_end(Trainer(callbacks=averaging, limit_train_batches=4, **settings))  # four batches are an epoch
    check_end(Trainer(callbacks=EMAWeightAveraging(), **settings))


def test_a_dead_worker_is_told_as_such_whatever_its_death_broke_off(tmp_path) -> None:
    died = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    of_ranks = ShardedCheckpoints()
    of_ranks._saving_to = tmp_path / "last.ckpt"
    with (
        pytest.raises(CheckpointError, match="cannot write") as one_file,
        patch.object(torch, "save", side_effect=died),
    ):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="cannot write") as shards, of_ranks._one_error():
        raise CheckpointException("write", {1: (died, None)})  # type: ignore[dict-item]
    for error in (one_file.value, shards.value):
        assert (user_message(error) or "").startswith("data worker process 7 died (Killed); ")
