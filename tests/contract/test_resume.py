"""`fit --ckpt_path` as its user meets it: a resumed run is the one that was saved, or its user says what is not."""

import json

import pytest
import torch

from tests.support.processes import run_ranks
from tests.support.runs import cli
from tests.support.stream_runs import losses, write_config, write_sources

STEPS, HALF = 6, 3
CONSTANT = ("--model.lr_schedule=constant", "--layer_dropout.max_dropout_rate=0")
OPTIONS = ("--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=0.01", "--trainer.accumulate_grad_batches=2")


def fit(monkeypatch, config, name, *options):
    arguments = ["--config", str(config), "--trainer.logger.init_args.name", name, *OPTIONS, *CONSTANT, *options]
    return cli(monkeypatch, "fit", *arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole run, and a half one."""
    folder = tmp_path_factory.mktemp("runs")
    config = write_config(folder, write_sources(folder), max_steps=STEPS, checkpoint_every=HALF, num_lanes=2)
    with pytest.MonkeyPatch.context() as patched:
        assert fit(patched, config, "whole") == 0
        assert fit(patched, config, "half", f"--trainer.max_steps={HALF}") == 0
    return folder


def resume(monkeypatch, folder, *options):
    """The half run, gone on with under another name."""
    checkpoint = str(folder / "half" / "checkpoints" / "last.ckpt")
    return fit(monkeypatch, folder / "config.yaml", "resumed", "--ckpt_path", checkpoint, *options)


@pytest.fixture(autouse=True)
def afresh(folder):
    yield
    for file in (folder / "resumed").rglob("*.ckpt"):
        file.unlink()
    for file in (folder / "resumed").glob("events*"):
        file.unlink()


pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")

CHANGES = {
    "early_exit": ("--early_exit.rotation_interval=2", "early_exit.rotation_interval 3 (given: 2)"),
    "layer_dropout": (
        "--layer_dropout.depth_scale=linear",
        "layer_dropout.depth_scale 'exponential' (given: 'linear')",
    ),
    "model.optimizer": ("--model.optimizer.lr=0.02", "model.optimizer.init_args.lr 0.01 (given: 0.02)"),
    "model.lr_schedule": ("--model.lr_schedule=cosine", "model.lr_schedule 'constant' (given: 'cosine')"),
    "trainer.precision": ("--trainer.precision=bf16-mixed", "trainer.precision None (given: 'bf16-mixed')"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_run_is_refused_with_the_difference_and_how_to_insist(name, folder, monkeypatch, capsys):
    option, difference = CHANGES[name]
    assert resume(monkeypatch, folder, option) == 2
    err = capsys.readouterr().err
    assert difference in err
    assert "insist with --allow_changes '[" in err
    assert len(err[err.index("error:") :].strip().splitlines()) == 1


def test_another_seed_is_another_order_of_data(folder, monkeypatch, capsys):
    assert resume(monkeypatch, folder, "--seed_everything=4", "--allow_changes=[seed_everything]") == 2
    assert "seed: got 4, allowed 3, as in the checkpoint; the order of training rows" in capsys.readouterr().err


def test_the_same_run_goes_on_and_may_log_and_validate_otherwise(folder, monkeypatch, capsys):
    others = ["--trainer.limit_val_batches=1", "--trainer.val_check_interval=2", "--data.init_args.num_workers=1"]
    others += ["--trainer.check_val_every_n_epoch=null"]
    assert resume(monkeypatch, folder, *others) == 0
    assert "stretched" not in capsys.readouterr().err  # its learning rate is constant
    resumed, whole = losses(folder / "resumed"), losses(folder / "whole")
    assert resumed == {step: whole[step] for step in range(HALF, STEPS)}


@pytest.mark.parametrize("allowed", ["model.optimizer", "model.optimizer.init_args.lr"])
def test_a_learning_rate_that_is_insisted_on_is_the_one_used(allowed, folder, monkeypatch):
    assert resume(monkeypatch, folder, "--model.optimizer.lr=0.001", "--allow_changes", f"[{allowed}]") == 0
    resumed, whole = losses(folder / "resumed"), losses(folder / "whole")
    assert resumed[HALF] == whole[HALF]  # of the weights that were saved
    assert resumed[HALF + 1] != whole[HALF + 1]
    saved = torch.load(folder / "resumed" / "checkpoints" / "last.ckpt", weights_only=True)
    assert [group["lr"] for group in saved["optimizer_states"][0]["param_groups"]] == [0.001, 0.001]
    assert [group["weight_decay"] > 0 for group in saved["optimizer_states"][0]["param_groups"]] == [True, False]
    assert saved["lr_schedulers"][0]["base_lrs"] == [0.001, 0.001]
    assert "allow_changes: []" in saved["run_config"]


def test_another_length_is_warned_of_where_the_runs_course_follows_from_it(folder, monkeypatch, capsys):
    assert resume(monkeypatch, folder, "--model.lr_schedule=cosine", "--allow_changes=[model]") == 0
    said = capsys.readouterr().err
    assert f"trainer.max_steps {HALF} (given: {STEPS}): model.lr_schedule is stretched with it" in said


def resume_on_two(folder):
    with pytest.MonkeyPatch.context() as patched:
        return resume(
            patched, folder, "--trainer.strategy=ddp", "--trainer.devices=2", "--trainer.accumulate_grad_batches=1"
        )


@pytest.mark.distributed
def test_a_run_goes_on_on_another_number_of_devices_with_the_same_global_batch(folder):
    assert run_ranks(resume_on_two, folder) == [0, 0]
    resumed, whole = losses(folder / "resumed"), losses(folder / "whole")
    assert resumed == pytest.approx({step: whole[step] for step in range(HALF, STEPS)}, abs=5e-6)


def resume_on_two_with_twice_the_batch(folder):
    with pytest.MonkeyPatch.context() as patched:
        return resume(patched, folder, "--trainer.strategy=ddp", "--trainer.devices=2")


@pytest.mark.distributed
def test_another_global_batch_is_refused(folder, capfd):
    assert run_ranks(resume_on_two_with_twice_the_batch, folder) == [2, 2]
    assert "error:" in capfd.readouterr().err


# -- damaged -----------------------------------------------------------------------------------------------------------


def test_one_flipped_bit_in_a_file_is_told_in_one_line_and_the_one_before_is_taken_if_wanted(
    folder, tmp_path, monkeypatch, capsys
):
    saver = {"class_path": "callbacks.LastCheckpoint", "init_args": {"every_n_train_steps": 2, "keep_previous": True}}
    callbacks = f"--trainer.callbacks={json.dumps([saver])}"
    assert fit(monkeypatch, folder / "config.yaml", "kept", callbacks, f"--trainer.max_steps={HALF}") == 0
    saved = folder / "kept" / "checkpoints"
    assert sorted(path.name for path in saved.iterdir()) == ["before_last.ckpt", "last.ckpt"]
    content = bytearray((saved / "last.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    (saved / "last.ckpt").write_bytes(content)
    assert torch.load(saved / "last.ckpt", weights_only=True)["global_step"] == HALF  # torch does not notice
    options = (callbacks, "--ckpt_path", "last")
    assert fit(monkeypatch, folder / "config.yaml", "kept", *options) == 2
    err = capsys.readouterr().err
    assert "last.ckpt is damaged: the bytes of " in err
    assert "before_last.ckpt (--fall_back_to_previous true takes it)" in err
    assert fit(monkeypatch, folder / "config.yaml", "kept", *options, "--fall_back_to_previous", "true") == 0
    assert f"{HALF - 2} steps are lost, training goes on after step 2" in capsys.readouterr().err
    kept, whole = losses(folder / "kept"), losses(folder / "whole")
    assert kept == whole
