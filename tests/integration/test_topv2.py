"""TOPv2 through the real module, callbacks and command line: resuming, scoring, and the experiment's configs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint

from app.checkpoints.weights import open_trained_weights
from callbacks import ParseValidation
from tests.support.processes import run_ranks
from tests.support.runs import Recorder, cli, curricula, make_module, make_trainer
from tests.support.stream_runs import losses
from tests.support.tiny_models import tiny_config
from tests.support.topv2_folders import DOMAINS, small_topv2, write_folder

CONFIGS = Path(__file__).parents[2] / "configs" / "experiment"
STEPS, SAVED_AT = 30, 17  # of 12 an epoch


def train(root: Path, *, resume: Path | None = None, **data: Any) -> tuple[list[Any], LightningModule]:
    recorder = Recorder()
    saver = ModelCheckpoint(dirpath=root / "checkpoints", every_n_train_steps=SAVED_AT, save_top_k=-1, filename="saved")
    trainer = make_trainer(root, max_steps=STEPS, callbacks=[*curricula(), recorder, saver])
    module = make_module(config=tiny_config(num_layers=4, vocab_size=330, max_length=256))
    trainer.fit(module, datamodule=small_topv2(root, **data), ckpt_path=resume)
    return recorder.steps, module


@pytest.mark.parametrize("data", [{"batch_size": 16}, {"batch_size": 4, "packed": True, "num_workers": 2}])
def test_a_resumed_run_sees_the_same_batches_and_ends_with_the_same_weights(
    tmp_path: Path, data: dict[str, Any]
) -> None:
    whole, module = train(tmp_path, **data)
    resumed, other = train(tmp_path, resume=tmp_path / "checkpoints" / "saved.ckpt", **data)
    assert resumed == whole[SAVED_AT:]
    assert all(map(torch.equal, module.parameters(), other.parameters()))
    assert whole[-1] != whole[SAVED_AT]


def test_what_the_model_writes_is_scored_by_domain(tmp_path: Path) -> None:
    scorer = ParseValidation(exit_layers=[2], num_draft_tokens=[3], num_examples=10, max_new_tokens=40)
    trainer = make_trainer(tmp_path, max_steps=2, callbacks=[scorer], limit_val_batches=1, val_check_interval=2)
    module = make_module(config=tiny_config(num_layers=4, vocab_size=330, max_length=256))
    trainer.fit(module, datamodule=small_topv2(tmp_path))
    scored = [name for name in trainer.callback_metrics if any(domain in name for domain in DOMAINS)]
    assert scored
    assert trainer.callback_metrics["val/loss/weather"] > 0
    table = scorer.report()
    assert table is not None
    assert table.rows


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The experiment's config in miniature, and its data where the config says."""
    write_folder(tmp_path / "topv2")
    settings = yaml.safe_load((CONFIGS / "topv2_small.yaml").read_text())
    settings["model"]["config"]["init_args"] |= {"hidden_size": 12, "intermediate_size": 24}
    settings["data"]["init_args"] |= {"domains": list(DOMAINS), "validation_rows": 8}
    settings["trainer"] |= {"max_steps": 3, "val_check_interval": 3, "accelerator": "cpu", "log_every_n_steps": 1}
    for callback in settings["trainer"]["callbacks"]:
        if callback["class_path"] == "callbacks.ParseValidation":
            callback["init_args"] |= {"num_examples": 4, "num_speed_examples": 1, "max_new_tokens": 8}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "small.yaml"


def assert_trained(run: str, *, has_dropout: bool, has_exits: bool) -> None:
    resolved = yaml.safe_load(Path(f"runs/{run}/config.yaml").read_text())
    assert (resolved["layer_dropout"]["max_dropout_rate"] > 0) == has_dropout
    assert (resolved["early_exit"]["curriculum"] != "none") == has_exits
    checkpoint = torch.load(f"runs/{run}/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3
    assert checkpoint["TOPv2DataModule"]["domains"] == "reminder, weather"


def test_a_variant_of_the_experiment_trains(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = yaml.safe_load(experiment.read_text())  # the miniature lies above it, without what the variant says
    del settings["layer_dropout"], settings["early_exit"], settings["trainer"]["logger"]
    experiment.write_text(yaml.safe_dump(settings))
    files = (CONFIGS / "topv2_small_layer_dropout.yaml", experiment)
    assert cli(monkeypatch, "fit", *(f"--config={file}" for file in files)) == 0
    assert_trained("topv2-layer-dropout", has_dropout=True, has_exits=False)


def fit(experiment: Path, name: str, *options: str) -> int:
    """Eight steps of two micro-batches, of SGD: Adam's first steps are signs, which would blow rounding up."""
    common = ["--layer_dropout.max_dropout_rate=0.5", "--trainer.max_steps=8", "--trainer.limit_val_batches=0"]
    common += ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.3", "--model.optimizer.fused=false"]
    common += ["--model.lr_schedule=constant"]
    saver = {"every_n_train_steps": 4, "keep_previous": True}
    common += [f"--trainer.callbacks={json.dumps([{'class_path': 'callbacks.LastCheckpoint', 'init_args': saver}])}"]
    with pytest.MonkeyPatch.context() as patched:
        arguments = ["--config", str(experiment), *common, f"--trainer.logger.init_args.name={name}", *options]
        return cli(patched, "fit", *arguments)


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_a_run_goes_on_on_two_sharded_ranks_with_unequal_rows(experiment: Path) -> None:
    write_folder(Path("topv2"), train=4)  # 5 rows: epochs of 2 or 3 steps, one of which has an odd number
    rows = "--data.init_args.batch_size=1"  # in some steps a rank has none
    assert fit(experiment, "whole", rows, "--trainer.accumulate_grad_batches=2") == 0
    sharded = ("--config", str(CONFIGS.parent / "trainer" / "fsdp2.yaml"), "--trainer.devices=2")
    half = "runs/whole/checkpoints/before_last.ckpt"
    assert run_ranks(fit, experiment, "resumed", rows, *sharded, "--ckpt_path", half) == [0, 0]
    whole, resumed = (losses(Path("runs", name)) for name in ("whole", "resumed"))
    assert resumed == pytest.approx({step: whole[step] for step in range(4, 8)}, abs=5e-6)
    files = (Path("runs", name, "checkpoints", "last.ckpt") for name in ("resumed", "whole"))
    ours, expected = map(open_trained_weights, files)
    assert all((ours.read(name) - expected.read(name)).abs().max() < 5e-6 for name in expected.shapes)


def test_the_experiment_trains_and_its_model_generates_from_its_own_checkpoint(
    experiment: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(monkeypatch, "fit", "--config", str(experiment), "--data.init_args.special_tokens=true") == 0
    assert_trained("topv2-layerskip", has_dropout=True, has_exits=True)
    capsys.readouterr()
    arguments = ["--prompt", "weather in rome =>", "--strategy", "autoregressive", "--max_new_tokens", "5", "--json"]
    assert cli(monkeypatch, "generate", "--model", "runs/topv2-layerskip/checkpoints/last.ckpt", *arguments) == 0
    assert json.loads(capsys.readouterr().out)["num_tokens"] >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.init_args.spis=10", "--data.init_args.domains=[alarm]"], "data.init_args.domains: got ['alarm']"),
        (["--data.init_args.path=elsewhere"], "no folder 'elsewhere'"),
        (["--data.init_args.domains=[alarm]"], "no file 'topv2/alarm_train.tsv'"),
        (["--data.init_args.target_format=xml"], "data.init_args.target_format"),
        (["--model.config.init_args.vocab_size=300"], "model.config.init_args.vocab_size: got 300, allowed >= "),
    ],
)
def test_a_mistake_ends_with_status_2_and_one_message(
    experiment: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert cli(monkeypatch, "fit", "--config", str(experiment), *arguments) == 2
    error = capsys.readouterr().err
    assert message in error.replace("data.target_format", "data.init_args.target_format")
    assert "Traceback" not in error
