"""`fit --ckpt_path` as its user meets it: a resumed run is the one that was saved, or its user says what is not."""

import copy
import csv
import json
import shutil

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from app.checkpoints.resumed_config import refuse_changes, saved_config
from app.checkpoints.run_record import RUN_CONFIG_KEY
from app.errors import CheckpointError, ConfigError
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
    "early_exit": (
        "--early_exit.rotation_interval=2",
        "early_exit.rotation_interval: got 2, the checkpoint has 3",
    ),
    "layer_dropout": (
        "--layer_dropout.depth_scale=linear",
        "layer_dropout.depth_scale: got 'linear', the checkpoint has 'exponential'",
    ),
    "model.optimizer": (
        "--model.optimizer.lr=0.02",
        "model.optimizer.init_args.lr: got 0.02, the checkpoint has 0.01",
    ),
    "model.lr_schedule": (
        "--model.lr_schedule=cosine",
        "model.lr_schedule: got 'cosine', the checkpoint has 'constant'",
    ),
    "trainer.precision": (
        "--trainer.precision=bf16-mixed",
        "trainer.precision: got 'bf16-mixed', the checkpoint has None",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_run_is_refused_with_the_difference_and_how_to_insist(name, folder, monkeypatch, capsys):
    option, difference = CHANGES[name]
    assert resume(monkeypatch, folder, option) == 2
    err = capsys.readouterr().err
    assert difference in err
    assert "insist with --allow_changes '[" in err
    assert len(err[err.index("error:") :].strip().splitlines()) == 1


TAGS = ("train/loss", "val/loss", "val/exit_loss/exit_01")


def test_each_point_is_logged_once_whether_a_validation_was_over_or_due_when_the_run_was_killed(
    folder, tmp_path, monkeypatch
):
    config = json.loads((folder / "config.yaml").read_text())
    saver = {"save_top_k": -1, "auto_insert_metric_name": False}
    savers = [saver | {"every_n_train_steps": HALF, "filename": "due-{step}"}]
    savers += [saver | {"monitor": "val/loss", "filename": "over-{step}"}]
    kind, logger = "lightning.pytorch.callbacks.ModelCheckpoint", config["trainer"]["logger"]
    logger["init_args"]["save_dir"] = str(tmp_path)
    config["trainer"] |= {"limit_val_batches": 1, "val_check_interval": HALF, "check_val_every_n_epoch": None}
    config["trainer"]["logger"] = [
        logger,
        copy.deepcopy(logger) | {"class_path": "lightning.pytorch.loggers.CSVLogger"},
    ]
    config["trainer"]["logger"][1]["init_args"]["name"] = "csv"
    config["trainer"]["callbacks"] = [{"class_path": kind, "init_args": each} for each in savers]
    config["trainer"]["callbacks"] += [{"class_path": "callbacks.ExitQualityMonitor"}]
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    run, rows_of, found = tmp_path / "run", tmp_path / "csv" / "metrics.csv", []
    for checkpoint in (None, "due", "over", "due"):  # as if killed at the end, each time
        path = run / "checkpoints" / f"{checkpoint}-{HALF}.ckpt"
        resumed = [f"--ckpt_path={path}"] if checkpoint else []
        assert cli(monkeypatch, "fit", "--config", str(tmp_path / "config.yaml"), *resumed) == 0
        events = EventAccumulator(str(run)).Reload()
        points = {tag: sorted((point.step, point.value) for point in events.Scalars(tag)) for tag in TAGS}
        with rows_of.open(newline="") as lines:
            rows = list(csv.DictReader(lines))
        if checkpoint is None:
            rows_of.unlink()  # as if it had been killed before the validation
        steps = {tag: [int(row["step"]) for row in rows if row[tag]] for tag in TAGS}
        found.append((points, [image.step for image in events.Images("val/exits")], steps))
    points, figures, steps = found[0]
    assert steps == {tag: [step for step, _ in points[tag]] for tag in TAGS}
    assert (steps["train/loss"], steps["val/loss"], figures) == (
        list(range(STEPS)),
        [HALF - 1, STEPS - 1],
        [HALF, STEPS],
    )
    steps["train/loss"] = list(range(HALF, STEPS))
    assert found[1:] == [found[0]] * 3


# None of these can be insisted on, by whatever name.
NEVER = {
    "seed_everything": (["--seed_everything=4"], "seed_everything: got 4, allowed 3, as in the checkpoint"),
    "optimizer": (
        ["--model.optimizer=torch.optim.SGD", "--allow_changes=[model.optimizer]"],
        "model.optimizer: got 'torch.optim.SGD', allowed 'torch.optim.AdamW', as in the checkpoint; its states are",
    ),
    "amsgrad": (
        ["--model.optimizer.amsgrad=true", "--allow_changes=[model]"],
        "model.optimizer.init_args.amsgrad: got True, allowed False, as in the checkpoint; the states that it needs",
    ),
    "vocab_size": (["--data.init_args.vocab_size=280"], "data.init_args.vocab_size: got 280, allowed 300, as in the"),
    "accumulate": (
        ["--trainer.accumulate_grad_batches=4"],
        "trainer.accumulate_grad_batches times devices: got 4, allowed 2, as in the checkpoint; the order of training"
        " rows depends on it: restore it (--trainer.accumulate_grad_batches 2)",
    ),
}


@pytest.mark.parametrize("name", NEVER)
def test_what_no_run_can_go_on_with_is_refused_by_the_users_name_for_it(name, folder, monkeypatch, capsys):
    options, message = NEVER[name]
    assert resume(monkeypatch, folder, *options) == 2
    err = capsys.readouterr().err
    assert f"error: {message}" in err
    assert "insist" not in err


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("early_exit.curiculum", "resumed"), ("seed_everything", "resumed"), ("data", "anew"),
    ],
)  # fmt: skip
def test_a_name_that_cannot_be_insisted_on_is_refused(name, start, folder, monkeypatch, capsys):
    if start == "resumed":
        assert resume(monkeypatch, folder, f"--allow_changes=[{name}]") == 2
    else:
        assert fit(monkeypatch, folder / "config.yaml", "anew", f"--allow_changes=[{name}]") == 2
    assert f"error: allow_changes: got '{name}', allowed model.optimizer | " in capsys.readouterr().err


def test_the_default_optimizer_is_adamw_and_may_be_named(monkeypatch, folder, capsys):
    assert cli(monkeypatch, "fit", "--config", str(folder / "config.yaml"), "--print_config") == 0
    default = yaml.safe_load(capsys.readouterr().out)
    named = {"model": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1}}}}
    saved = {"model": {"optimizer": default["model"]["optimizer"]}}
    with pytest.raises(CheckpointError, match="insist with --allow_changes"):
        refuse_changes(saved, named, allowed=[])
    refuse_changes(saved, named, allowed=["model.optimizer"])


def test_a_refused_resume_leaves_no_file(folder, monkeypatch):
    assert resume(monkeypatch, folder, "--early_exit.rotation_interval=2", "--trainer.logger.init_args.name=no") == 2
    assert not (folder / "no").exists()


def test_a_run_config_that_is_none_is_told_in_one_message(folder, monkeypatch, tmp_path, capsys):
    odd = [7, "text", "trainer: 7", "a: [", "!!python/object/apply:os.system [true]", "!!timestamp x", None]
    for value in odd:
        with pytest.raises(CheckpointError, match="the checkpoint's 'run_config' is damaged: "):
            saved_config({RUN_CONFIG_KEY: value})
    checkpoint = torch.load(folder / "half" / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save(checkpoint | {RUN_CONFIG_KEY: "a: ["}, tmp_path / "odd.ckpt")
    assert resume(monkeypatch, folder, "--ckpt_path", str(tmp_path / "odd.ckpt")) == 2
    assert "error: the checkpoint's 'run_config' is damaged: " in capsys.readouterr().err


def test_a_checkpoint_behind_the_runs_end_is_told_to_leave_nothing_to_train(folder, monkeypatch, capsys):
    assert resume(monkeypatch, folder, "--trainer.max_steps=2") == 0
    said = capsys.readouterr().err
    assert f"WARNING: trainer.max_steps 2: the checkpoint is of step {HALF}, nothing is left to train" in said
    assert resume(monkeypatch, folder) == 0
    assert "nothing is left" not in capsys.readouterr().err


@pytest.fixture(scope="module")
def poisoned(folder):
    """A checkpoint with NaN in one weight, and the weight's name."""
    path, name = folder / "poisoned.ckpt", "model.layers.2.mlp.up_proj.weight"
    checkpoint = torch.load(folder / "half" / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["state_dict"][f"model.{name}"][-1, -1] = float("nan")
    torch.save(checkpoint, path)
    return path, name


@pytest.mark.parametrize("verb", ["fit", "fit --model.pretrained", "validate", "predict", "export", "generate"])
def test_weights_that_are_not_finite_are_refused_by_name_before_anything_is_written(
    folder, monkeypatch, tmp_path, capsys, poisoned, verb
):
    path, name = map(str, poisoned)
    config = ["--config", str(folder / "config.yaml"), *OPTIONS, *CONSTANT]
    config += ["--trainer.logger.init_args.save_dir", str(tmp_path)]
    options = {
        "fit --model.pretrained": [*config, "--model.config=null", "--model.pretrained", path],
        "export": ["--model", path, "--output_dir", str(tmp_path / "out")],
        "generate": ["--model", path, "--prompt", "a"],
    }
    assert cli(monkeypatch, verb.split()[0], *options.get(verb, [*config, "--ckpt_path", path])) == 2
    said = capsys.readouterr()
    (message,) = [line for line in said.err.splitlines() if "error: " in line]
    assert f"{path}: " in message
    assert name in message
    assert "NaN or infinity" in message
    assert not said.out
    assert [*tmp_path.iterdir()] == []


def test_a_resume_that_is_refused_leaves_the_folder_of_the_run_as_it_was(folder, monkeypatch, poisoned):
    before = sorted((folder / "half").rglob("*"))
    assert fit(monkeypatch, folder / "config.yaml", "half", "--ckpt_path", str(poisoned[0])) == 2
    assert sorted((folder / "half").rglob("*")) == before


def test_an_evaluation_that_is_refused_is_told_why_beside_an_earlier_one(folder, monkeypatch, capsys, poisoned):
    earlier = folder / "half" / "validate" / "events.out.tfevents.1.earlier"
    earlier.parent.mkdir()
    earlier.touch()
    named = ["--trainer.logger.init_args.name", "half", "--ckpt_path", str(poisoned[0])]
    assert cli(monkeypatch, "validate", "--config", str(folder / "config.yaml"), *named) == 2
    assert "NaN or infinity" in capsys.readouterr().err
    assert [*earlier.parent.iterdir()] == [earlier]
    shutil.rmtree(earlier.parent)


def test_validate_of_another_tokenizers_size_is_refused_by_that(folder, monkeypatch, capsys):
    options = ["--trainer.limit_val_batches=1", "--data.init_args.vocab_size=280", "--ckpt_path"]
    checkpoint = str(folder / "half" / "checkpoints" / "last.ckpt")
    assert cli(monkeypatch, "validate", "--config", str(folder / "config.yaml"), *options, checkpoint) == 2
    assert "error: data.init_args.vocab_size: got 280, allowed 300" in capsys.readouterr().err


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


CYCLE = {"class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": {"max_lr": 0.01, "total_steps": STEPS}}


def test_a_scheduler_class_goes_on_from_its_state_also_where_others_may_insist(folder, monkeypatch, capsys):
    def part(name, *options):
        options = ["--model.lr_scheduler", json.dumps(CYCLE), "--model.warmup_steps=0", *options]
        assert fit(monkeypatch, folder / "config.yaml", name, *options) == 0
        content = torch.load(folder / name / "checkpoints" / "last.ckpt", weights_only=True)
        return content["optimizer_states"][0]["param_groups"], content["lr_schedulers"], losses(folder / name)

    groups, *_ = part("cycle", f"--trainer.max_steps={HALF}")
    resumed = ["--ckpt_path", str(folder / "cycle" / "checkpoints" / "last.ckpt")]
    found = [part("resumed", *resumed, *insisting) for insisting in ([], ["--allow_changes=[model]"])]
    assert found[0] == found[1]
    assert found[0][0][0]["betas"] != groups[0]["betas"]  # which this class moves, too
    assert "stretched" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"lr_scheduler": None}, "model.lr_scheduler: got 'None', allowed 'torch.optim.lr_scheduler.OneCycleLR', as"),
        (
            {"lr_scheduler": CYCLE | {"init_args": {"max_lr": 2.0}}},
            "init_args.max_lr: got 2.0, allowed 0.01, as in the",
        ),
        (
            {"lr_scheduler": CYCLE, "optimizer": {"init_args": {"lr": 1.0}}},
            "optimizer.init_args.lr: got 1.0, allowed 0",
        ),
    ],
)
def test_nothing_that_a_scheduler_class_was_made_from_can_be_insisted_on(model, message):
    saved = {"model": {"lr_scheduler": CYCLE, "optimizer": {"init_args": {"lr": 0.1}}}}
    with pytest.raises(ConfigError, match=message):
        refuse_changes(saved, {"model": saved["model"] | model}, allowed=["model"])


def test_another_warmup_that_is_insisted_on_acts_from_the_first_step(folder, monkeypatch):
    found = []
    for allowed in ("model.warmup_steps", "model"):
        assert resume(monkeypatch, folder, "--model.warmup_steps=0", "--allow_changes", f"[{allowed}]") == 0
        found.append(losses(folder / "resumed"))
    assert found[0] == found[1]
    assert found[0][HALF + 1] != losses(folder / "whole")[HALF + 1]


def test_a_weight_decay_acts_on_a_run_that_had_none(folder, monkeypatch):
    decay = "--model.optimizer.weight_decay"
    assert fit(monkeypatch, folder / "config.yaml", "plain", f"{decay}=0", f"--trainer.max_steps={HALF}") == 0
    checkpoint = folder / "plain" / "checkpoints" / "last.ckpt"
    options = (f"{decay}=0.1", "--ckpt_path", str(checkpoint), "--allow_changes=[model.optimizer]")
    assert resume(monkeypatch, folder, *options) == 0
    saved = torch.load(folder / "resumed" / "checkpoints" / "last.ckpt", weights_only=True)
    assert [group["weight_decay"] for group in saved["optimizer_states"][0]["param_groups"]] == [0.1, 0.0]


def test_another_length_is_warned_of_where_the_runs_course_follows_from_it(folder, monkeypatch, capsys):
    assert resume(monkeypatch, folder, "--model.lr_schedule=cosine", "--allow_changes=[model]") == 0
    said = capsys.readouterr().err
    assert f"trainer.max_steps: got {STEPS}, the checkpoint has {HALF}: model.lr_schedule is stretched with it" in said


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
    assert "last.ckpt: damaged, the bytes of " in err
    assert "before_last.ckpt (--fall_back_to_previous true takes it)" in err
    assert fit(monkeypatch, folder / "config.yaml", "kept", *options, "--fall_back_to_previous", "true") == 0
    assert f"{HALF - 2} steps are lost, training goes on after step 2" in capsys.readouterr().err
    kept, whole = losses(folder / "kept"), losses(folder / "whole")
    assert kept == whole


@pytest.mark.parametrize("given", ["auto", "PATH", None])
def test_where_only_the_checkpoint_before_the_last_is_left_it_is_named_and_taken_if_wanted(
    given, folder, monkeypatch, capsys
):
    name = f"left_{given}"
    saved = folder / name / "checkpoints"
    saved.mkdir(parents=True)
    shutil.copy(folder / "half" / "checkpoints" / "last.ckpt", saved / "before_last.ckpt")
    value = str(saved / "last.ckpt") if given == "PATH" else given
    options = [] if given is None else ["--ckpt_path", value]
    assert fit(monkeypatch, folder / "config.yaml", name, *options) == 2
    err = capsys.readouterr().err
    assert str(saved / "before_last.ckpt") in err
    assert "--fall_back_to_previous true" in err
    assert [path.name for path in saved.iterdir()] == ["before_last.ckpt"]
    if given is not None:
        assert fit(monkeypatch, folder / "config.yaml", name, *options, "--fall_back_to_previous=true") == 0
        assert min(losses(folder / name)) == HALF
