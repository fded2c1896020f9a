"""What can go wrong with a run, and what is left afterwards."""

import subprocess
import sys
import textwrap

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from app.errors import CheckpointError, DivergenceError
from app.training.checkpoint_io import AtomicCheckpointIO
from tests.support.runs import curricula, make_data, make_module, make_trainer
from tests.support.tiny_models import tiny_config


class PoisonAt(Callback):
    """Makes one block's weights NaN before a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, *_):
        if trainer.global_step == self.step:
            with torch.no_grad():
                pl_module.model.model.layers[2].mlp.up_proj.weight.fill_(float("nan"))


def test_nan_loss_stops_naming_step_and_exit_and_keeps_the_last_checkpoint(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path / "ckpt", every_n_train_steps=2, save_top_k=-1)
    module = make_module()
    trainer = make_trainer(tmp_path, max_steps=10, callbacks=[*curricula(max_dropout_rate=0.0), PoisonAt(5), saver])
    with pytest.raises(DivergenceError, match=r"loss at exit 3 is nan at step 5"):
        trainer.fit(module, datamodule=make_data(tmp_path))
    saved = sorted((tmp_path / "ckpt").glob("*.ckpt"))
    assert [path.stem.split("step=")[1] for path in saved] == ["2", "4"]
    weights = torch.load(saved[-1], weights_only=True)["state_dict"]
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


class PoisonGradientAt(Callback):
    """Makes one gradient infinite after the backward of a step; the loss stays finite."""

    def __init__(self, step):
        self.step = step

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == self.step:
            pl_module.model.lm_head.weight.grad.fill_(float("inf"))


def test_infinite_gradient_stops_before_it_reaches_the_weights(tmp_path):
    module = make_module()
    saver = ModelCheckpoint(dirpath=tmp_path / "ckpt", every_n_train_steps=1, save_top_k=-1)
    trainer = make_trainer(
        tmp_path, max_steps=6, callbacks=[*curricula(), PoisonGradientAt(3), saver], gradient_clip_val=1.0
    )
    with pytest.raises(DivergenceError, match=r"gradient norm is inf at step 3 with exits \["):
        trainer.fit(module, datamodule=make_data(tmp_path))
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    assert len(list((tmp_path / "ckpt").glob("*.ckpt"))) == 3


def test_truncated_checkpoint_is_refused_with_its_name(tmp_path):
    path = tmp_path / "half.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.ones(1000)}}, path)
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(CheckpointError, match=r"half\.ckpt is truncated or damaged"):
        AtomicCheckpointIO().load_checkpoint(path)


def test_checkpoint_with_objects_is_refused(tmp_path):
    path = tmp_path / "objects.ckpt"
    torch.save({"config": tiny_config()}, path)
    with pytest.raises(CheckpointError, match="not plain tensors"):
        AtomicCheckpointIO().load_checkpoint(path)


def test_missing_checkpoint_is_refused_with_its_name(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "absent.ckpt")


def test_full_disk_while_saving_leaves_the_previous_checkpoint_and_nothing_else(tmp_path):
    """A file-size limit stands in for the full disk: both make write() fail in the middle of the file."""
    script = textwrap.dedent(
        """
        import resource, signal, sys, torch
        from app.errors import CheckpointError
        from app.training.checkpoint_io import AtomicCheckpointIO
        path = sys.argv[1]
        AtomicCheckpointIO().save_checkpoint({"w": torch.ones(10)}, path)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            AtomicCheckpointIO().save_checkpoint({"w": torch.zeros(1_000_000)}, path)
        except CheckpointError as error:
            print(error)
        """
    )
    path = tmp_path / "last.ckpt"
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert "cannot write checkpoint" in done.stdout
    assert "File too large" in done.stdout
    assert torch.equal(AtomicCheckpointIO().load_checkpoint(path)["w"], torch.ones(10))
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_checkpoint_of_another_shape_is_refused_naming_the_difference(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True, every_n_train_steps=1, save_top_k=0)
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[saver])
    trainer.fit(make_module(), datamodule=make_data(tmp_path))
    wider = make_module(config=tiny_config(num_layers=4, hidden_size=64, vocab_size=300, max_length=128))
    trainer = make_trainer(tmp_path, max_steps=2, callbacks=[])
    with pytest.raises(CheckpointError, match=r"another shape: hidden_size 32 \(config: 64\)"):
        trainer.fit(wider, datamodule=make_data(tmp_path), ckpt_path=str(tmp_path / "ckpt" / "last.ckpt"))
