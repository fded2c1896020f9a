"""What can go wrong with a run, and what is left afterwards."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from app.errors import CheckpointError
from app.training.checkpoint_io import AtomicCheckpointIO
from tests.support.runs import cli, make_data, make_module, make_trainer
from tests.support.stream_runs import write_config, write_sources
from tests.support.tiny_models import tiny_config


class KillWorker(Callback):
    """Kill -9 of a data worker at step 3."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        if trainer.global_step == 3:
            os.kill(workers[0].pid, signal.SIGKILL)


def test_a_data_worker_that_dies_ends_the_run_with_what_to_do(tmp_path, monkeypatch, capsys):
    config = write_config(tmp_path, write_sources(tmp_path), max_steps=500, checkpoint_every=2, num_workers=2)
    callback = f"{KillWorker.__module__}.KillWorker"
    options = ["--allowed_classes+", "tests", f"--trainer.callbacks+={callback}"]
    assert cli(monkeypatch, "fit", "--config", str(config), *options) == 2
    message = capsys.readouterr().err
    assert re.search(r"error: data worker process \d+ died \(.*\); .*--data\.num_workers.*--ckpt_path last\n$", message)
    assert "Traceback" not in message
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


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
