"""SIGTERM and SIGUSR1 at one rank: all take the step they are in, save, exit well, and go on as if nothing had been."""

import os
import signal
import stat
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
import torch.multiprocessing as mp
from lightning.pytorch.callbacks import ModelCheckpoint

from app.training.module import LayerSkipModule
from callbacks import LastCheckpoint, Preemption
from tests.support.processes import run_ranks
from tests.support.runs import Recorder, cli, curricula, make_data, make_module, make_trainer
from tests.support.stream_runs import losses, write_config, write_sources

STEPS = 8
OPTIONS = ("--trainer.accumulate_grad_batches=2", "--model.optimizer=torch.optim.AdamW")


def signalled_in(step, signums, *, rank=0):
    """LayerSkipModule.training_step that gets signals in its first micro-batch of a step."""
    original, pending = LayerSkipModule.training_step, list(signums)

    def training_step(self, batch, batch_idx):
        while pending and self.trainer.global_step == step and self.trainer.global_rank == rank:
            os.kill(os.getpid(), pending.pop(0))
        return original(self, batch, batch_idx)

    return training_step


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path, write_sources(tmp_path), max_steps=STEPS, checkpoint_every=100, num_lanes=2)


def fit(monkeypatch, config, name, *options):
    arguments = ["--config", str(config), "--trainer.logger.init_args.name", name, *OPTIONS, *options]
    return cli(monkeypatch, "fit", *arguments)


def test_a_signal_ends_a_run_behind_its_step_and_auto_goes_on_to_the_same_losses(config, tmp_path, monkeypatch, capsys):
    signum = signal.SIGTERM
    assert fit(monkeypatch, config, "whole", "--ckpt_path", "auto") == 0  # nothing to go on from: it starts
    with monkeypatch.context() as patched:
        patched.setattr(LayerSkipModule, "training_step", signalled_in(3, [signum]))
        handler = signal.getsignal(signum)
        assert fit(monkeypatch, config, "stopped") == 0
        assert signal.getsignal(signum) == handler
    saved = tmp_path / "stopped" / "checkpoints" / "last.ckpt"
    assert (
        f"{signum.name}: stopped after step 4; {saved} is whole: go on with --ckpt_path last" in capsys.readouterr().err
    )
    assert torch.load(saved, weights_only=True)["global_step"] == 4
    stopped = losses(tmp_path / "stopped")
    assert fit(monkeypatch, config, "stopped", "--ckpt_path", "auto") == 0
    expected = losses(tmp_path / "whole")
    assert stopped.keys() == {0, 1, 2, 3}
    assert len(expected) == STEPS
    assert losses(tmp_path / "stopped") == expected


def test_a_signal_in_a_validation_within_a_step_saves_the_step_before_and_the_best_weights(tmp_path, caplog):
    validate, pending = LayerSkipModule.validation_step, [signal.SIGTERM]

    def validation_step(self, batch, batch_idx):
        while pending and self.trainer.global_step == 4:  # behind micro-batch 8, the first of two
            os.kill(os.getpid(), pending.pop())
        return validate(self, batch, batch_idx)

    def part(name, ckpt_path=None):
        folder = tmp_path / name
        best = ModelCheckpoint(folder, filename="best", monitor="val/loss", auto_insert_metric_name=False)
        callbacks = [*curricula(), recorder := Recorder(), Preemption(), best, LastCheckpoint(dirpath=str(folder))]
        settings = {"val_check_interval": 3, "check_val_every_n_epoch": None, "limit_val_batches": 1}
        trainer = make_trainer(tmp_path, max_steps=STEPS, callbacks=callbacks, accumulate_grad_batches=2, **settings)
        with suppress(SystemExit):
            trainer.fit(make_module(), datamodule=make_data(tmp_path), ckpt_path=ckpt_path)
        return recorder.steps, torch.load(folder / "last.ckpt", weights_only=True)

    steps, whole = part("whole")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LayerSkipModule, "validation_step", validation_step)
        before, _ = part("stopped")
    saved = tmp_path / "stopped" / "last.ckpt"
    assert f"SIGTERM: stopped after step 4; {saved} is whole: go on with" in caplog.text
    assert before == steps[:9]
    assert torch.load(saved.with_name("best.ckpt"), weights_only=True)["global_step"] == 4
    after, end = part("stopped", str(saved))
    assert after == steps[8:]
    assert all(torch.equal(weight, whole["state_dict"][name]) for name, weight in end["state_dict"].items())


def stop_rank_1(config, strategy):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LayerSkipModule, "training_step", signalled_in(3, [signal.SIGTERM], rank=1))
        options = ("--trainer.devices=2", *strategy)
        arguments = ["--config", str(config), "--trainer.logger.init_args.name", "stopped", *OPTIONS, *options]
        status = cli(patched, "fit", *arguments)
    return status, cli(pytest.MonkeyPatch(), "fit", *arguments, "--ckpt_path", "auto")


def signal_the_group(config, signum, num_workers):
    os.setpgrp()  # this process and its data workers, as SLURM has them
    original, pending = LayerSkipModule.training_step, [signum]

    def training_step(self, batch, batch_idx):
        while pending and self.trainer.global_step == 3:
            subprocess.run(["kill", f"-{pending.pop()}", "--", f"-{os.getpgrp()}"], check=False)  # itself, too
        return original(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LayerSkipModule, "training_step", training_step)
        return fit(patched, config, "stopped", "--data.num_workers", str(num_workers))


@pytest.mark.skipif(sys.platform != "linux", reason="no other system tells who sent a signal")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_all_processes_of_a_job_leaves_data_workers_to_finish_the_step(config, tmp_path, signum):
    assert run_ranks(signal_the_group, config, int(signum), 2, world_size=1) == [0]
    saved = tmp_path / "stopped" / "checkpoints" / "last.ckpt"
    assert torch.load(saved, weights_only=True)["global_step"] == 4


def interrupt(config):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the parent may ignore it, and then so would this
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LayerSkipModule, "training_step", signalled_in(3, [signal.SIGINT]))
        return fit(patched, config, "stopped", "--trainer.callbacks.every_n_train_steps=2")


def test_ctrl_c_ends_at_once_with_status_130_and_leaves_what_was_saved(config, tmp_path):
    assert run_ranks(interrupt, config, world_size=1) == [130]
    assert torch.load(tmp_path / "stopped" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


MESH = '{"class_path": "app.training.strategy.MeshStrategy", "init_args": {"asynchronous": true}}'


@pytest.mark.distributed
def test_a_signal_at_one_rank_alone_stops_both_behind_the_same_step(config, tmp_path):
    assert run_ranks(stop_rank_1, config, ("--trainer.strategy", MESH)) == [(0, 0), (0, 0)]
    events = losses(tmp_path / "stopped")
    assert len(events) == STEPS


# -- what the signals mean ---------------------------------------------------------------------------------------------


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A SLURM job whose scontrol notes what it is called with; its notes."""
    notes, program = tmp_path / "scontrol.txt", tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {notes}\nexit "${{SCONTROL_STATUS:-0}}"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    return notes


@pytest.mark.parametrize(
    ("signum", "environment", "options", "called"),
    [
        (signal.SIGUSR1, {"SLURM_ARRAY_JOB_ID": "47", "SLURM_ARRAY_TASK_ID": "2"}, (), "requeue 47_2\n"),
        (signal.SIGUSR1, {}, ("--preemption.requeue", "false"), None),
        (signal.SIGTERM, {}, (), None),  # by whoever cancels the job
    ],
    ids=["of an array", "not wanted", "cancelled"],
)
def test_a_slurm_job_queues_itself_again_when_its_time_is_up_alone(
    config, tmp_path, monkeypatch, scontrol, signum, environment, options, called
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(LayerSkipModule, "training_step", signalled_in(1, [signum]))
    assert fit(monkeypatch, config, "run", *options) == 0
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
    assert (scontrol.read_text() if scontrol.exists() else None) == called


def test_a_job_whose_time_is_up_before_it_trains_queues_itself_again(config, tmp_path, monkeypatch, scontrol, capsys):
    build = LayerSkipModule.configure_model

    def configure_model(self):
        os.kill(os.getpid(), signal.SIGUSR1)
        build(self)

    handler = signal.getsignal(signal.SIGUSR1)
    with monkeypatch.context() as patched:
        patched.setattr(LayerSkipModule, "configure_model", configure_model)
        assert fit(patched, config, "run") == 0
    assert signal.getsignal(signal.SIGUSR1) == handler
    assert "SIGUSR1: stopped after step 0; nothing to save yet" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert scontrol.read_text() == "requeue 4711\n"
    assert fit(monkeypatch, config, "run", "--ckpt_path", "auto") == 0  # it is told once
    assert len(losses(tmp_path / "run")) == STEPS


def test_a_job_that_cannot_be_queued_again_says_so(config, monkeypatch, scontrol, capsys):
    monkeypatch.setenv("SCONTROL_STATUS", "1")
    monkeypatch.setattr(LayerSkipModule, "training_step", signalled_in(1, [signal.SIGUSR1]))
    assert fit(monkeypatch, config, "run") == 0
    assert "ERROR: cannot queue SLURM job 4711 again: status 1" in capsys.readouterr().err


def end_at_once(later):
    preemption = Preemption()
    preemption._note(signal.SIGTERM, None)
    preemption._received_at -= later
    signal.signal(signal.SIGTERM, preemption._note)
    os.kill(os.getpid(), signal.SIGTERM)
    return os._exit(7)


@pytest.mark.parametrize(("later", "status"), [(0.0, 7), (10.0, -signal.SIGTERM)], ids=["passed on", "again"])
def test_a_second_signal_ends_at_once_unless_it_is_the_first_passed_on(later, status):
    child = mp.get_context("fork").Process(target=end_at_once, args=(later,))
    child.start()
    child.join(timeout=120)
    assert child.exitcode == status
