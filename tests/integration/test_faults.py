"""What can go wrong with a run, and what is left afterwards."""

import json
import multiprocessing
import os
import re
import resource
import shutil
import signal

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from app.checkpoints import checkpoint_io
from app.checkpoints.atomic import publish
from app.checkpoints.checkpoint_io import AtomicCheckpointIO
from app.checkpoints.integrity import damage
from app.checkpoints.weights import open_trained_weights
from app.errors import CheckpointError
from callbacks import LastCheckpoint
from tests.support.checkpoints import flip_bit
from tests.support.processes import run_ranks
from tests.support.runs import cli, make_data, make_module, make_trainer
from tests.support.stream_runs import write_config, write_sources
from tests.support.tiny_models import tiny_config


def test_a_data_worker_that_dies_while_a_checkpoint_is_written_ends_the_run_with_what_to_do(
    tmp_path, monkeypatch, capsys
):
    killed = []

    def publish_with_a_dead_worker(path, **settings):
        if not killed:  # what it had prepared may last beyond another checkpoint
            killed.append(multiprocessing.active_children()[0])
            killed[0].kill()
            os.waitid(os.P_PID, killed[0].pid, os.WEXITED | os.WNOWAIT)  # its exit status stays for torch's handler
        publish(path, **settings)

    monkeypatch.setattr(checkpoint_io, "publish", publish_with_a_dead_worker)
    config = write_config(tmp_path, write_sources(tmp_path), max_steps=500, checkpoint_every=2, num_workers=2)
    assert cli(monkeypatch, "fit", "--config", str(config)) == 2
    message = capsys.readouterr().err
    assert re.search(
        r"error: data worker process \d+ died \(Killed\); .*--data\.num_workers.*--ckpt_path auto\n$", message
    )
    assert "Traceback" not in message
    written = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert damage(written) is None
    assert open_trained_weights(written).metadata["global_step"] in (2, 4, 6)


class RemoveRun(Callback):
    """The run's folder goes at step 3."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 3:
            shutil.rmtree(trainer.log_dir)


@pytest.mark.parametrize(("logger", "file"), [("TensorBoardLogger", "events.out"), ("CSVLogger", "metrics.csv")])
def test_a_logger_that_cannot_write_ends_the_run_with_one_message(tmp_path, monkeypatch, capfd, logger, file):
    config = write_config(tmp_path, write_sources(tmp_path), max_steps=60, checkpoint_every=100)
    content = json.loads(config.read_text())
    content["trainer"]["logger"]["class_path"] = f"lightning.pytorch.loggers.{logger}"
    config.write_text(json.dumps(content))
    options = ["--allowed_classes+", "tests", f"--trainer.callbacks+={RemoveRun.__module__}.RemoveRun"]
    assert cli(monkeypatch, "fit", "--config", str(config), *options) == 2
    message = capfd.readouterr().err
    assert re.search(
        rf"error: No such file or directory: {tmp_path}/run/{file}\S*; files .*--ckpt_path auto\)\n$", message
    )
    assert "Traceback" not in message


def test_truncated_checkpoint_is_refused_with_its_name(tmp_path):
    path = tmp_path / "half.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.ones(1000)}}, path)
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(CheckpointError, match=r"half\.ckpt: truncated or damaged"):
        AtomicCheckpointIO().load_checkpoint(path)


def test_checkpoint_with_objects_is_refused(tmp_path):
    path = tmp_path / "objects.ckpt"
    torch.save({"config": tiny_config()}, path)
    with pytest.raises(CheckpointError, match="not plain tensors"):
        AtomicCheckpointIO().load_checkpoint(path)


def test_missing_checkpoint_is_refused_with_its_name(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "absent.ckpt")


def save_on_a_full_disk(path):
    """A file-size limit stands in for the full disk: both make write() fail in the middle of the file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    with pytest.raises(CheckpointError) as caught:
        AtomicCheckpointIO().save_checkpoint({"w": torch.zeros(1_000_000)}, path)
    return str(caught.value)


def test_full_disk_while_saving_leaves_the_previous_checkpoint_and_nothing_else(tmp_path):
    path = tmp_path / "last.ckpt"
    content = {"pytorch-lightning_version": "2.6.0", "global_step": 1, "state_dict": {"w": torch.ones(10)}}
    AtomicCheckpointIO().save_checkpoint(content, path)
    (message,) = run_ranks(save_on_a_full_disk, path, world_size=1)
    assert "cannot write checkpoint" in message
    assert "File too large" in message
    assert torch.equal(AtomicCheckpointIO().load_checkpoint(path)["state_dict"]["w"], torch.ones(10))
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_checkpoint_of_another_shape_is_refused_naming_the_difference(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True, every_n_train_steps=1, save_top_k=0)
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[saver])
    trainer.fit(make_module(), datamodule=make_data(tmp_path))
    wider = make_module(config=tiny_config(num_layers=4, hidden_size=64, vocab_size=300, max_length=128))
    trainer = make_trainer(tmp_path, max_steps=2, callbacks=[])
    with pytest.raises(CheckpointError, match=r"another shape: hidden_size 32 \(config: 64\)"):
        trainer.fit(wider, datamodule=make_data(tmp_path), ckpt_path=str(tmp_path / "ckpt" / "last.ckpt"))


# -- checkpoints that are damaged, partial or foreign ------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the command line: its config, and what its two checkpoints hold."""
    folder = tmp_path_factory.mktemp("run")
    config = write_config(folder, write_sources(folder), max_steps=2, checkpoint_every=2)
    saver = {"dirpath": str(folder / "run" / "weights"), "filename": "step", "save_weights_only": True}
    content = json.loads(config.read_text())
    content["trainer"]["callbacks"].append(
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saver | {"every_n_train_steps": 1}}
    )
    content["trainer"] |= {"limit_val_batches": 1, "val_check_interval": 2}
    config.write_text(json.dumps(content))
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert cli(monkeypatch, "fit", "--config", str(config)) == 0
    paths = {"whole": folder / "run" / "checkpoints" / "last.ckpt", "weights": folder / "run" / "weights" / "step.ckpt"}
    return config, paths


def verbs(config, path, folder):
    """Every way to read weights."""
    start = ["--config", str(config), "--trainer.logger.init_args.name", folder.name]
    return {
        "fit --ckpt_path": ["fit", *start[:2], "--ckpt_path", str(path)],
        "validate": ["validate", *start, "--ckpt_path", str(path)],
        "test": ["test", *start, "--ckpt_path", str(path)],
        "predict": ["predict", *start, "--ckpt_path", str(path)],
        "fit --model.pretrained": ["fit", *start, "--model.config", "null", "--model.pretrained", str(path)],
        "export": ["export", "--model", str(path), "--output_dir", str(folder / "out")],
        "generate": ["generate", "--model", str(path), "--prompt", "a", "--strategy", "autoregressive"],
    }


VERBS = ["fit --ckpt_path", "validate", "test", "predict", "fit --model.pretrained", "export", "generate"]


@pytest.mark.parametrize("verb", VERBS)
def test_weights_with_a_flipped_bit_are_used_by_no_verb(run, tmp_path, monkeypatch, capsys, verb):
    config, paths = run
    path = tmp_path / "damaged.ckpt"
    shutil.copy(paths["whole"], path)
    flip_bit(path, open_trained_weights(path).read("lm_head.weight").numpy().tobytes())
    assert cli(monkeypatch, *verbs(config, path, tmp_path)[verb]) == 2
    message = capsys.readouterr().err
    assert "damaged.ckpt: damaged, the bytes of data/" in message
    assert "Traceback" not in message
    assert [entry.name for entry in tmp_path.iterdir()] == ["damaged.ckpt"]


@pytest.mark.parametrize("verb", VERBS)
def test_a_file_of_weights_alone_serves_every_verb_but_one_that_resumes(run, tmp_path, monkeypatch, capsys, verb):
    config, paths = run
    resumes = verb == "fit --ckpt_path"
    assert cli(monkeypatch, *verbs(config, paths["weights"], tmp_path)[verb]) == (2 if resumes else 0)
    assert resumes == (f"weights only, no run to go on with (no optimizer_states, lr_schedulers in it): "
                       f"--model.pretrained {paths['weights']} starts" in capsys.readouterr().err)  # fmt: skip


def with_entry(*path, value):
    """A checkpoint with one entry changed, deep in it."""

    def changed(content):
        node = content
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
        return content

    return changed


STATES = ("optimizer_states", 0, "state", 0)
FOREIGN = {
    "a state of another shape": (
        with_entry(*STATES, "exp_avg", value=torch.zeros(3)),
        "optimizer_states.0.state.0.exp_avg: got float32 [3], allowed float32 [300, 16]",
    ),
    "an optimizer's own settings": (
        with_entry("optimizer_states", 0, "param_groups", 1, "betas", value=(0.5, 0.5)),
        "param_groups.1.betas: got (0.5, 0.5), allowed (0.9, 0.95), as configured",
    ),
    "no loops": (with_entry("loops", value={}), "weights only, no run to go on with (no loops in it)"),
    "a number for loops": (with_entry("loops", value=5), "damaged or foreign, its 'loops' is no dict"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_file_that_no_run_can_go_on_from_ends_in_one_message(run, tmp_path, monkeypatch, capsys, case):
    config, paths = run
    change, expected = FOREIGN[case]
    path = tmp_path / "foreign.ckpt"
    torch.save(change(torch.load(paths["whole"], weights_only=True)), path)
    assert cli(monkeypatch, *verbs(config, path, tmp_path)["fit --ckpt_path"]) == 2
    error = capsys.readouterr().err.partition("error: ")[2]
    assert "foreign.ckpt" in error
    assert expected in error
    assert len(error.splitlines()) == 1


def fit_on(root, *, until, resume=None):
    saver = LastCheckpoint(dirpath=str(root / "kept"), every_n_train_steps=1, keep_previous=True)
    trainer = make_trainer(root, max_steps=until, callbacks=[saver], plugins=[AtomicCheckpointIO(use_previous=True)])
    trainer.fit(make_module(), datamodule=make_data(root), ckpt_path=resume)


def kept_steps(root):
    paths = [root / "kept" / name for name in ("before_last.ckpt", "last.ckpt")]
    assert [damage(path) for path in paths] == [None, None]
    return [open_trained_weights(path).metadata["global_step"] for path in paths]


@pytest.mark.parametrize("resume", ["last.ckpt", "before_last.ckpt"])
def test_what_a_run_fell_back_on_stays_until_there_are_two_whole_ones_again(tmp_path, resume):
    fit_on(tmp_path, until=2)
    last = tmp_path / "kept" / "last.ckpt"
    flip_bit(last, open_trained_weights(last).read("lm_head.weight").numpy().tobytes())
    fit_on(tmp_path, until=2, resume=str(last.with_name(resume)))
    assert kept_steps(tmp_path) == [1, 2]
    fit_on(tmp_path, until=3, resume=str(last))
    assert kept_steps(tmp_path) == [2, 3]


def test_saving_says_nothing_of_loading_more_than_weights(tmp_path, caplog):
    with caplog.at_level("INFO"):
        fit_on(tmp_path, until=2)
    assert "weights_only" not in caplog.text
