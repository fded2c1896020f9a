"""The command line as a user meets it: every mistake ends with status 2 and one message that names the field."""

import csv
import json
import logging
import os
import re
import tempfile
from collections import Counter
from io import StringIO
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from app.checkpoints.run_record import RUN_CONFIG_KEY
from app.cli.parsing import training_parser
from app.cli.parsing.parser_messages import one_line
from app.cli.parsing.training_parser import TrainingParser
from tests.support.processes import run_ranks
from tests.support.runs import cli, write_corpus
from tests.support.saved_models import save_model
from tests.support.tokenizers import byte_level

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """quickstart.yaml, with a tiny model, a small corpus and a folder of its own."""
    root = tmp_path_factory.mktemp("cli")
    corpus = write_corpus(root / "corpus")
    settings = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    settings["model"]["config"]["init_args"] |= {
        "vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    settings["early_exit"] |= {"rotation_interval": 3}
    settings["data"]["init_args"] |= {
        "sources": {"code": {"kind": "files", "path": str(corpus)}},
        "seq_len": 24, "batch_size": 2, "vocab_size": 300, "validation_share": 0.2, "cache_dir": str(root / "cache"),
    }  # fmt: skip
    settings["trainer"] |= {"max_steps": 6, "val_check_interval": 3, "log_every_n_steps": 1}
    settings["trainer"]["logger"]["init_args"] |= {"save_dir": str(root), "name": "run"}
    for callback in settings["trainer"]["callbacks"]:
        arguments = callback.setdefault("init_args", {})
        if "every_n_train_steps" in arguments:
            arguments["every_n_train_steps"] = 2
        if callback["class_path"].endswith("SelfSpeculativeValidation"):
            arguments |= {"exit_layers": [1, 2], "num_draft_tokens": [2], "num_prompts": 1, "prompt_length": 4}
            arguments["max_new_tokens"] = 4
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def lean(config):
    """The same with a single callback, which is read in less time, for mistakes that do not concern the others."""
    settings = yaml.safe_load(config.read_text())
    settings["trainer"]["callbacks"] = [{"class_path": "callbacks.LastCheckpoint"}]
    path = config.with_name("lean.yaml")
    path.write_text(yaml.safe_dump(settings))
    return path


SOURCES = "--data.init_args.sources"
MISTAKES = [
    (["--model.foo", "1"], "model.foo: unknown key"),
    (["--data.foo", "1"], "data.foo: unknown key of datamodules.TextCodeDataModule"),
    (["--layer_dropout.max_dropout_rate", "abc"], "layer_dropout.max_dropout_rate: got abc, allowed float"),
    (["--early_exit.curriculum", "foo"], "early_exit.curriculum: got foo, allowed rotational | gradual | fixed | none"),
    (["--data.batch_size", "abc"], "data.batch_size: got abc, allowed int"),
    (["--layer_dropout.max_dropout_rate", "1.0"], "layer_dropout.max_dropout_rate: got 1.0, allowed [0, 1)"),
    (["--data.init_args.batch_size", "0"], "data.init_args.batch_size: got 0, allowed [1, 65536]"),
    ([SOURCES, '{"x": {"kind": "files"}}'], "data.init_args.sources.x.path: got None, allowed a folder"),
    (["--trainer.max_steps=-1", "--trainer.max_epochs=-1"], "trainer.max_steps: got -1, allowed >= 1: the stream"),
    (["--trainer.max_steps=-1", "--trainer.max_epochs=-1", "--trainer.limit_train_batches=4",
      "--layer_dropout.time_scale=exponential"], "layer_dropout.time_scale: got 'exponential', allowed"),
    (["--model.config.init_args.num_attention_heads", "5"], "not a multiple of the number of attention heads (5)"),
    (["--trainer.accumulate_grad_batches", "0"], "trainer.accumulate_grad_batches: got 0, allowed [1, 1000000]"),
    (["--trainer.gradient_clip_val", "-1"], "trainer.gradient_clip_val: got -1"),
    (["--seed_everything", "-1"], "seed_everything: got -1, allowed [0, 4294967295]"),
    (["--model.lr_scheduler", "ReduceLROnPlateau"], "got ReduceLROnPlateau, allowed the class path of LRScheduler"),
    (["--early_exit.curriculum", "gradual", "--trainer.max_steps=-1", "--trainer.max_epochs=-1",
      "--trainer.limit_train_batches=4", "--layer_dropout.time_scale", "constant"],
      "early_exit.curriculum: got 'gradual', allowed only"),
    (["--trainer.callbacks=LastCheckpoint", "--trainer.callbacks.every_n_train_steps=0"],
      "trainer.callbacks.0.init_args.every_n_train_steps: got 0, allowed [1, inf)"),
    (["--ckpt_path", ""], "ckpt_path: got '', allowed an existing checkpoint"),
    (["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", "inf"],
      "model.optimizer.lr: got inf, allowed float (a finite number)"),
    (["--trainer.strategy", '{"class_path": "SingleDeviceStrateg"}'], "trainer.strategy: got SingleDeviceStrateg, al"),
    (["--trainer.strategy={class_path: MeshStrategy, init_args: {foo: 1}}"], "trainer.strategy.foo: unknown key of a"),
    (["--ckpt_path", "last"], "ckpt_path: got 'last', but there is no last.ckpt in"),
    (["--data", "Nope"], "data: got Nope, allowed the class path of LightningDataModule; nearest: "),
    (["--data.class_path", "datamodules.TextCodeDataModul"], "LightningDataModule; nearest: TextCodeDataModule"),
    (["--data", "torch.optim.Adam"], "data: got torch.optim.Adam, allowed the class path of LightningDataModule"),
    (["--trainer.callbacks", '[{"class_path": "ExitQualityMonitr"}]'], "Callback; nearest: ExitQualityMonitor, "),
    (["--trainer.callbacks", '[{"class_path": "LayerDropoutCurriculum"}]'],
      "trainer.callbacks: got 'LayerDropoutCurriculum', allowed callbacks without a group of their own; set --layer_d"),
    (["--model.optimizer", "torch.optim.AdamX"], "got torch.optim.AdamX, allowed the class path of Optimizer; neares"),
    (["--model.optimizer", "AdamX"], "model.optimizer: got AdamX, allowed the class path of Optimizer; nearest: Adam,"),
    (["--optimizer.lr", "1"], "optimizer.lr: unknown key; the optimizer is model.optimizer, as in --model.optimizer t"),
    (["--model.init_args.warmup_steps", "3"], "LayerSkipModule, and has no init_args: model.warmup_steps"),
    (["--trainer.limit_val_batches", "x"], "trainer.limit_val_batches: got x, allowed int | float"),
    (["--trainer.precision", "7"], "trainer.precision: got 7, allowed 64 | 32 | 16 | transformer-engine | "),
    (["--data.sources.code", "3"], "data.sources.code: got '3', allowed the settings of a Source"),
    (["--data.sources.code.weight", "nan"], "data.sources.code.weight: got nan, allowed float (a finite number)"),
    ([SOURCES, '{"a": {"kind": "files", "path": "x"}, "b": {"kind": "files", "path": 3}}'], "data.sources.b.path: got"),
    ([SOURCES, '{"a": {"kind": "files", "path": "x"}, "b": {"path": "x"}}'], "data.sources.b.kind: required by datamo"),
    ([SOURCES, '{"a": {"kind": "files", "pth": "x"}}'], "data.sources.a.pth: unknown key of datamodules.Source"),
    ([SOURCES, '{"a": 3}'], "data.sources.a: got 3, allowed the settings of a Source"),
    (["--trainer.limit_train_batches", "0.5"], "error: trainer.limit_train_batches: When using an `IterableDataset`"),
    (["--early_exit", "x"], "early_exit: got 'x', allowed its keys, as in --early_exit.KEY VALUE"),
    (["--model", '{"class_path": "LayerSkipModule", "init_args": {"seed": 3}}'], "has no init_args: model.seed"),
    (["--model", "my_llama"], "--model.KEY VALUE; the model that a run begins with is model.pretrained"),
    (["--trainer.profiler.init_args.filename", "x"], "trainer.profiler.filename: got 'x', allowed after the class"),
    (["--model.lr_scheduler.gamma", "0.5"], "model.lr_scheduler.gamma: got '0.5', allowed after the class"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_a_mistake_ends_with_status_2_and_names_the_field(lean, monkeypatch, capsys, arguments, message):
    assert cli(monkeypatch, "fit", "--config", str(lean), *arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert len(err[err.index("error:") :].strip().splitlines()) <= 2


REFUSED_EARLY = [
    (["--early_exit.rotation_interval", "5"], "early_exit.rotation_interval: got 5, allowed [1, 4]"),
    (["--early_exit.curriculum=fixed", "--early_exit.exit_layers=[4]"], "early_exit.exit_layers: got [4], allo"),
    (["--trainer.callbacks=SelfSpeculativeValidation", "--trainer.callbacks.exit_layers=[4]",
      "--trainer.callbacks.num_draft_tokens=[2]"], "exit_layers: got [4], allowed 1..3 for a 4-layer model"),
    (["--model.config.init_args.num_hidden_layers=1", "--early_exit.rotation_interval=1",
      "--trainer.callbacks=SelfSpeculativeValidation", "--trainer.callbacks.exit_layers=[1]",
      "--trainer.callbacks.num_draft_tokens=[2]"],
      "exit_layers: got [1], allowed none in a model of one block; take SelfSpeculativeValidation out of trainer.call"),
    (["--trainer.callbacks=ExitQualityMonitor", "--trainer.callbacks.exit_layers=[5]"], "exit_layers: got [5], allo"),
    (["--trainer.max_steps", "0"], "trainer.max_steps: got 0, allowed >= 1: the stream"),
    (["--trainer.max_steps=-1", "--trainer.limit_train_batches=4"], "model.lr_schedule: got 'cosine', allowed only"),
    (["--data.init_args.seq_len", "65"], "data.init_args.seq_len: got 65, allowed 1..64"),
    (["--model.optimizer.init_args.lr", "-1"], "model.optimizer: got 'Invalid learning rate: -1"),
    (["--model.optimizer=torch.optim.LBFGS"], "allowed a class that takes groups of parameters, such as torch.optim."),
    (["--trainer.callbacks=ExitQualityMonitor", "--trainer.callbacks+=ExitQualityMonitor"],
      "trainer.callbacks: got more than one ExitQualityMonitor, allowed one: a checkpoint"),
    (["--data.tokenizer=./absent"], "data.init_args.tokenizer: got './absent', allowed a directory (or hub id) with"),
    (["--model.config.init_args.hidden_size", "0"], "init_args.hidden_size: got 0, allowed [1, 2147483647]"),
    (["--trainer.accelerator=cpu", "--trainer.devices=2", "--early_exit.always_on_last=false"],
      "early_exit.always_on_last: got False, allowed true on more than one device"),
    (["--trainer.val_check_interval", "0"], "trainer.val_check_interval: got 0, allowed a number of batches"),
    (["--trainer.check_val_every_n_epoch", "0"], "trainer.check_val_every_n_epoch: got 0, allowed [1, inf)"),
    (["--trainer.limit_train_batches", "0"], "trainer.limit_train_batches: got 0, allowed more than 0"),
    (["--trainer.max_steps", "1000000000000000000000"], "trainer.max_steps: got 1000000000000000000000, allowed [-9"),
    (["--model.config.init_args.num_attention_heads=4", "--model.config.init_args.num_key_value_heads=3"],
      "model.config.init_args.num_key_value_heads: got 3, allowed a divisor of num_attention_heads 4"),
    (["--model.config.init_args.num_attention_heads", "0"], "num_attention_heads: got 0, allowed [1, "),
    (["--trainer.devices", "100000"], "trainer.devices: got 100000, allowed [0, "),
    (["--trainer.accumulate_grad_batches", "1000000000000"], "got 1000000000000, allowed [1, 1000000]"),
    (["--trainer.max_epochs", "0"], "trainer.max_epochs: got 0, allowed more than 0"),
    (["--model.config.init_args.hidden_act", "foo"], "model.config.init_args.hidden_act: got 'foo', allowed gelu | "),
    (["--model.config.init_args.rope_parameters", '{"rope_type": "foo"}'], "rope_type: got 'foo', allowed default | l"),
    (["--model.config", "transformers.GPT2Config"], "model: got 'gpt2', allowed a decoder with `layers` and `norm`"),
    (["--model.config.init_args.attention_dropout", "2"], "attention_dropout: got 2, allowed [0.0, 1.0]"),
    (["--model.config.init_args.intermediate_size", "0"], "intermediate_size: got 0, allowed [1, 2147483647]"),
    (["--model.config.init_args.num_hidden_layers", "10000000"], "num_hidden_layers: got 10000000, allowed [1, 10000]"),
    (["--model.config.init_args.hidden_size", "1000000000"], "weights', allowed what "),
    (["--data.vocab_size", "1000000000000"], "data.init_args.vocab_size: got 1000000000000, allowed [257, 1048576]"),
    (["--data.batch_size", "1000000000000000"], "batch_size: got 1000000000000000, allowed [1, 65536]"),
    (["--data.num_workers", "100000"], "data.init_args.num_workers: got 100000, allowed [0, 1024]"),
    (["--config", "{trainer: {callbacks: &a [*a]}}"], "allowed fewer than 100,000 values; an alias (*NAME)"),
    (["--trainer.logger.init_args.name", "../../x"], "trainer.logger.init_args.name: got '../../x', allowed a name or"),
    (["--trainer.logger.init_args.max_queue", "x"], "trainer.logger.init_args.max_queue: got 'x', allowed a number"),
    (["--trainer.logger.init_args.version", "/x"], "trainer.logger.init_args.version: got '/x', allowed a name or pa"),
    (["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.filename=../x"], "filename: got '../x', allowed a n"),
    (["--trainer.logger.init_args.save_dir", "/dev/null/x"], "trainer.logger: got '/dev/null/x/run', allowed a f"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), REFUSED_EARLY, ids=[message[:40] for _, message in REFUSED_EARLY])
def test_a_refused_fit_leaves_nothing_behind(lean, tmp_path, monkeypatch, capsys, arguments, message):
    folder = ["--trainer.logger.init_args.save_dir", str(tmp_path), "--data.init_args.cache_dir", str(tmp_path)]
    of_transformers = StringIO()
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [logging.StreamHandler(of_transformers)])
    assert cli(monkeypatch, "fit", "--config", str(lean), *folder, *arguments) == 2
    assert message in capsys.readouterr().err
    assert of_transformers.getvalue() == ""
    assert not list(tmp_path.iterdir())


def test_a_refused_fit_loads_no_weights(config, tmp_path, monkeypatch, capsys):
    model = save_model(tmp_path / "model", max_length=64)
    monkeypatch.setattr("app.training.module.load_pretrained", None)
    continued = ["--model.config=null", "--model.pretrained", str(model), "--trainer.logger.save_dir", str(tmp_path)]
    assert cli(monkeypatch, "fit", "--config", str(config), *continued, "--early_exit.rotation_interval", "99") == 2
    assert "early_exit.rotation_interval: got 99, allowed [1, " in capsys.readouterr().err
    settings = json.loads((model / "config.json").read_text())
    unknown = json.dumps(settings | {"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}})
    (model / "config.json").write_text(unknown)
    assert cli(monkeypatch, "fit", "--config", str(config), *continued) == 2
    assert (
        f"model.pretrained: got '{model}', allowed a model that can be built; config.json: rope_type: got 'foo', all"
        in (capsys.readouterr().err)
    )
    (model / "config.json").write_text(json.dumps(settings))
    byte_level(vocab_size=290).save_pretrained(other := tmp_path / "other")
    for verb in ("fit", "data"):
        assert cli(monkeypatch, verb, "--config", str(config), *continued, f"--data.tokenizer={other}") == 2
        wanted = f"data.init_args.tokenizer: got '{other}', allowed the tokenizer of {model}"
        assert wanted in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other"]


def _refused(config, root):
    os.environ |= {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    arguments = ["--trainer.accelerator=cpu", "--trainer.devices=2", f"--trainer.logger.init_args.save_dir={root}"]
    with pytest.MonkeyPatch.context() as patch:
        return cli(patch, "fit", "--config", str(config), *arguments, "--early_exit.rotation_interval", "5")


@pytest.mark.distributed
def test_all_ranks_of_torchrun_refuse_alike(config, tmp_path):
    assert run_ranks(_refused, config, tmp_path) == [2, 2]
    assert not list(tmp_path.iterdir())


def test_unknown_keys_in_yaml_are_errors_too(config, tmp_path, monkeypatch, capsys):
    extra = tmp_path / "extra.yaml"
    for text, field in (
        ("trainer: {max_stepz: 3}", "trainer.max_stepz"),
        ("early_exit: {interval: 3}", "early_exit.interval"),
        ("trainer: 3", "trainer: got 3, allowed its keys, as in --trainer.KEY VALUE"),
        ("early_exit: 3", "early_exit: got 3, allowed its keys"),
    ):
        extra.write_text(text)
        assert cli(monkeypatch, "fit", "--config", str(config), "--config", str(extra)) == 2
        assert field in capsys.readouterr().err


def test_what_is_required_and_where_help_is_are_named_for_the_verb(monkeypatch, capsys):
    assert cli(monkeypatch, "fit") == 2
    assert capsys.readouterr().err == "error: data: required, but not given\n(options: layerskip fit --help)\n"
    assert cli(monkeypatch, "fit", "--data", "TextCodeDataModule") == 2
    assert "data.sources: required by datamodules.TextCodeDataModule, but not given" in capsys.readouterr().err


def test_unknown_verb_and_no_verb(monkeypatch, capsys):
    assert cli(monkeypatch, "fitt") == 2
    assert "verb: got 'fitt', allowed fit | validate" in capsys.readouterr().err
    assert cli(monkeypatch, "--help") == 0
    assert "generate" in capsys.readouterr().out


def test_messages_that_are_not_understood_pass_unchanged():
    assert one_line("something new from jsonargparse") == "something new from jsonargparse"


def test_print_config_shows_stacked_configs_with_the_later_winning(config, tmp_path, monkeypatch, capsys):
    later = tmp_path / "later.yaml"
    later.write_text("early_exit: {curriculum: none}\n")
    assert cli(monkeypatch, "fit", "--config", str(config), "--config", str(later), "--print_config") == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["early_exit"]["curriculum"] == "none"
    assert shown["early_exit"]["rotation_interval"] == 3


@pytest.fixture(scope="module")
def started():
    """What of a run's costly start was done, as often as it was done."""
    return Counter()


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Where the command of the run is given, and the temporary folder."""
    # Data workers hand tensors over through sockets in the latter, whose paths may have 107 characters.
    with tempfile.TemporaryDirectory() as temporary:
        yield tmp_path_factory.mktemp("here"), Path(temporary)


@pytest.fixture(scope="module")
def run(config, started, elsewhere):
    """A finished run, by the real command; without the progress bar that the config lists, as cluster jobs are."""

    def counted(name, function):
        def call(*args, **kwargs):
            started[name] += (
                name != "dump" or "trainer" in args[1]
            )  # the settings of a class are written with dump, too
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (TrainingParser, "dump"),
            (TrainingParser, "add_method_arguments"),
            (training_parser, "with_included"),
        ):
            patch.setattr(owner, name, counted(name, getattr(owner, name)))
        patch.chdir(elsewhere[0])
        patch.setattr(tempfile, "tempdir", str(elsewhere[1]))
        assert cli(patch, "fit", "--config", str(config), "--trainer.enable_progress_bar", "false") == 0
    return config.parent / "run"


def test_a_second_fit_does_not_overwrite_the_first(config, run, monkeypatch, capsys):
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    assert cli(monkeypatch, "fit", "--config", str(config)) == 2
    assert "is the checkpoint of an earlier run that this one would overwrite" in capsys.readouterr().err
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before


def test_a_fit_without_a_logger_writes_to_the_root_folder_and_does_without_what_only_logs(
    config, tmp_path, monkeypatch, capsys
):
    given = ["--config", str(config), "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}"]
    needy = [
        f"--trainer.callbacks+=lightning.pytorch.callbacks.{each}"
        for each in ("LearningRateMonitor", "DeviceStatsMonitor")
    ]
    (mine := tmp_path / "config.yaml").write_text("mine")
    assert cli(monkeypatch, "fit", *given) == 2
    assert "allowed a folder without a config.yaml" in capsys.readouterr().err
    assert mine.read_text() == "mine"
    mine.unlink()
    assert cli(monkeypatch, "fit", *given, *needy, "--trainer.max_steps=1") == 0, capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "config.yaml"]
    assert cli(monkeypatch, "fit", *given) == 2
    assert "or --trainer.default_root_dir where no logger has one" in capsys.readouterr().err


def test_a_fast_dev_run_leaves_what_it_finds_and_nothing_else(config, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where checkpoints go without a logger, and Lightning takes it out
    earlier = tmp_path / "checkpoints" / "last.ckpt"
    earlier.parent.mkdir()
    earlier.write_bytes(b"of another run")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert cli(monkeypatch, "fit", "--config", str(config), "--trainer.fast_dev_run", "true") == 0
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [earlier]
    assert earlier.read_bytes() == b"of another run"
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_start_makes_one_parser_and_reads_and_writes_the_settings_once(run, started):
    assert started == {"add_method_arguments": 1, "with_included": 1, "dump": 1}


def test_fit_leaves_nothing_where_it_was_given_or_in_the_temporary_folder(run, elsewhere):
    assert [path for folder in elsewhere for path in folder.iterdir()] == []


def test_fit_leaves_config_checkpoints_and_events(run, capsys):
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert (run / "config.yaml").read_text() == last[RUN_CONFIG_KEY]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert list(run.glob("events.out.tfevents.*"))


def test_the_saved_config_is_complete_and_validates_the_best_checkpoint(run, monkeypatch, capsys):
    best, events = run / "checkpoints" / "best.ckpt", sorted(run.glob("events.out.tfevents.*"))
    assert cli(monkeypatch, "validate", "--config", str(run / "config.yaml"), "--ckpt_path", str(best)) == 0
    out, err = capsys.readouterr()
    assert re.search(r"val/loss +│ +\d\.\d+ │", out)
    assert not re.search(r"\d\.\d{6}|DataLoader 0", out)  # Lightning's table
    assert out.count("val/exit_loss") == 0  # they are in the table of exits
    assert "litlogger" not in err
    assert "after" not in out  # what was measured now, not the history of the checkpoint
    assert "Exits on held-out tokens" in out
    assert "Self-speculative against autoregressive decoding" in out
    # TensorBoard would cut the curves of the fit where a later file of its folder goes back to an earlier step.
    assert sorted(run.glob("events.out.tfevents.*")) == events
    logged, step = EventAccumulator(str(run / "validate")).Reload(), torch.load(best, weights_only=True)["global_step"]
    assert {point.step for point in logged.Scalars("val/loss")} == {step - 1}
    tables = set(logged.Tags()["tensors"]) - {"custom_scalars__config__"}  # a layout of charts has no step
    assert {point.step for tag in tables for point in logged.Tensors(tag)} == {step}
    assert {point.step for tag in logged.Tags()["images"] for point in logged.Images(tag)} == {step}


@pytest.mark.parametrize("verb", ["test", "predict"])
def test_test_and_predict_run_on_a_checkpoint(run, monkeypatch, capsys, verb):
    arguments = ["--config", str(run / "config.yaml"), *(["--verbose", "false"] if verb == "test" else [])]
    assert cli(monkeypatch, verb, *arguments, "--ckpt_path", str(run / "checkpoints" / "last.ckpt")) == 0
    said = capsys.readouterr()
    assert "test/loss" not in said.out
    assert "random weights" not in said.err
    assert (run / "predictions.jsonl").is_file() == (verb == "predict")


def test_what_is_measured_without_a_checkpoint_is_told_to_be_of_random_weights(run, monkeypatch, capsys):
    assert cli(monkeypatch, "test", "--config", str(run / "config.yaml")) == 0
    assert "no --ckpt_path is given: what follows is measured on random weights" in capsys.readouterr().err


def test_truncated_checkpoint_ends_with_status_2_and_its_name(run, tmp_path, monkeypatch, capsys):
    half = tmp_path / "half.ckpt"
    whole = (run / "checkpoints" / "last.ckpt").read_bytes()
    half.write_bytes(whole[: len(whole) // 2])
    assert cli(monkeypatch, "fit", "--config", str(run / "config.yaml"), "--ckpt_path", str(half)) == 2
    assert re.search(r"error: checkpoint .*half\.ckpt: truncated or damaged", capsys.readouterr().err)


def test_resuming_with_another_data_order_is_refused_by_name(run, monkeypatch, capsys):
    arguments = ["--config", str(run / "config.yaml"), "--ckpt_path", "last", "--trainer.max_steps", "8"]
    assert cli(monkeypatch, "fit", *arguments, "--data.init_args.batch_size", "4") == 2
    assert "data.init_args.batch_size: got 4, allowed 2, as in the checkpoint" in capsys.readouterr().err


def test_resume_from_last_continues(run, monkeypatch, capsys):
    arguments = ["--config", str(run / "config.yaml"), "--ckpt_path", "last", "--trainer.max_steps", "9"]
    assert cli(monkeypatch, "fit", *arguments) == 0
    assert "after 9 steps" in capsys.readouterr().out


def test_a_curriculum_of_ones_own_is_added_as_the_recipe_says(config, tmp_path, monkeypatch, capsys):
    recipe = (CONFIGS.parent / "app" / "README.md").read_text().split("## How to add a curriculum of your own")[1]
    code, command = re.search(r"```python\n(.*?)```.*?```bash\nlayerskip (.*?)```", recipe, re.DOTALL).groups()
    (tmp_path / "my_curricula.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = command.replace("\\\n", "").replace("configs/quickstart.yaml", str(config)).split()
    folder = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(tmp_path), "--trainer.logger.name", "x"]
    assert cli(monkeypatch, *arguments, *folder, "--trainer.logger.version", "a") == 0
    rows = list(csv.DictReader((tmp_path / "x" / "a" / "metrics.csv").read_text().splitlines()))
    weights = [float(row["train/exit_weight/exit_02"]) for row in rows if row["train/exit_weight/exit_02"]]
    assert weights == pytest.approx([0.5 * (1 - step / 6) for step in range(6)])
    assert {row["train/dropout_rate/last_layer"][:6] for row in rows} - {""} == {"0.2000"}
    assert cli(monkeypatch, *arguments, *folder, "--trainer.logger.version", "b", "--early_exit.curriculum=fixed",
               "--early_exit.exit_layers=[1]") == 2  # fmt: skip
    assert "trainer.callbacks: got 'FadingExit and EarlyExitCurriculum', allowed one" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")  # Lightning 2.6 on torch 2.13
def test_the_script_with_a_datamodule_of_ones_own_trains(tmp_path, monkeypatch, capsys):
    recipe = (CONFIGS.parent / "app" / "README.md").read_text().split("and how to train from a script")[1]
    (code,) = re.findall(r"```python\n(.*?)```", recipe, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "script", "exec"), scope := {})  # noqa: S102 - ours
    assert scope["trainer"].callback_metrics["val/exit_loss/exit_02"] < 1.5  # of log(64) = 4.2
    assert list(tmp_path.glob("lightning_logs/version_0/checkpoints/last.ckpt"))


def test_generate_decodes_from_a_runs_checkpoint(run, monkeypatch, capsys):
    capsys.readouterr()
    common = ["--model", str(run / "checkpoints" / "last.ckpt"), "--prompt", "def function", "--max_new_tokens", "9"]
    tokens = []
    for strategy in ("autoregressive", "self_speculative"):
        assert cli(monkeypatch, "generate", *common, "--strategy", strategy, "--json") == 0
        tokens.append(json.loads(capsys.readouterr().out)["tokens"])
    assert tokens[0] == tokens[1]
    assert len(tokens[0]) == 9


def test_decoding_from_a_damaged_or_foreign_checkpoint_is_refused_by_name(run, tmp_path, monkeypatch, capsys):
    damaged, foreign = tmp_path / "damaged.ckpt", tmp_path / "foreign.ckpt"
    damaged.write_bytes((run / "checkpoints" / "last.ckpt").read_bytes()[:5000])
    torch.save({"state_dict": {}}, foreign)
    for path, message in ((damaged, "damaged.ckpt: truncated"), (foreign, "foreign.ckpt: not written by LayerSkip")):
        assert cli(monkeypatch, "generate", "--model", str(path), "--prompt", "x") == 2
        assert message in capsys.readouterr().err


def test_a_versioned_csv_log_goes_on_in_its_version_and_loses_nothing(config, tmp_path, monkeypatch, capsys):
    arguments = ["--config", str(config), "--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}"]
    arguments += ["--trainer.logger.version=null"]
    for steps, resumed in (("2", "auto"), ("4", "last")):
        given = [*arguments, "--model.lr_schedule=constant", "--trainer.max_steps", steps, "--ckpt_path", resumed]
        assert cli(monkeypatch, "fit", *given, "--trainer.enable_progress_bar=false") == 0, capsys.readouterr().err
    assert cli(monkeypatch, "validate", *given) == 0
    (version,) = (tmp_path / "run").iterdir()
    with (version / "metrics.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["step"] for row in rows if row.get("train/loss")] == ["0", "1", "2", "3"]
    assert sum(bool(row.get("val/loss")) for row in rows) >= 2
    assert not (version / "metrics.csv.kept").exists()


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        (
            "benchmark",
            [
                "--strategies",
                "[autoregressive]",
                "--max_new_tokens",
                "2",
                "--model",
                ".",
                "--prompts",
                "p.jsonl",
                "--output",
                "new.json",
            ],
        ),
        ("evaluate", ["--model", ".", "--tasks", "[boolq]", "--output", "new.json"]),
        ("lens", ["--model", ".", "--prompt", "x", "--output", "there.png"]),
        ("plot", ["--results", "a=b", "--output", "there.png"]),
    ],
)
def test_no_verb_replaces_a_file_unless_told_to(verb, options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text('{"prompt": "x"}')
    for name in ("new.png", "there.png"):  # a figure is written beside new.json
        Path(name).write_text("mine")
    assert cli(monkeypatch, verb, *options) == 2
    name = Path(options[-1]).with_suffix(".png")
    assert f"got '{options[-1]}', allowed a new file; --overwrite true replaces {name}" in capsys.readouterr().err
    assert name.read_text() == "mine"
    assert cli(monkeypatch, verb, *options, "--overwrite", "true") == 2  # of the next mistake
    assert "allowed a new file" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "options", "warning"),
    [
        (
            "evaluate",
            ["--tasks", "[boolq]", "--tasks=[piqa]"],
            "--tasks is given 2 lists: only the last one counts, [piqa]",
        ),
        ("evaluate", ["--tasks", "[boolq]", "--tasks", "[boolq]"], None),
        ("lens", ["--prompt", "[a]", "--prompt", "[b]"], None),
        (
            "fit",
            ["--early_exit.exit_layers=[1]", "--early_exit.exit_layers=[2]", "--seed_everything=-1"],
            "--early_exit.exit_layers is given 2 lists: only the last one counts, [2]",
        ),
        ("fit", ["--trainer.callbacks+=[Timer]", "--trainer.callbacks+=[ModelSummary]", "--seed_everything=-1"], None),
    ],
)
def test_the_last_of_several_lists_of_an_option_counts_with_a_warning(
    verb, options, warning, config, tmp_path, monkeypatch, capsys
):
    common = ["--config", str(config)] if verb == "fit" else ["--model", str(tmp_path), "--output", "nowhere/x"]
    assert cli(monkeypatch, verb, *common, *options) == 2
    said = capsys.readouterr().err
    assert "only the last one counts" not in said if warning is None else f"WARNING: {warning}\n" in said
