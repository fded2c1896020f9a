"""What the loggers of a run get, and how TensorBoard arranges it."""

import csv
import json
import struct
from collections import Counter, defaultdict
from time import monotonic, sleep

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from app import metric_names
from app.cli.run_folder import warn_of_shared_folder
from app.reports.scalars import read_scalars
from callbacks import DataMonitor, ExitQualityMonitor, RunLogs, SelfSpeculativeValidation, ThroughputMonitor
from callbacks.run_logs import is_detail, shown_depths
from callbacks.tensorboard import EVENT_FILES, points
from tests.support.processes import run_ranks
from tests.support.runs import cli, curricula, make_data, make_module, make_trainer
from tests.support.stream_runs import write_config, write_sources
from tests.support.tiny_models import tiny_config

DEEP = 10
SETTINGS = {
    "max_dropout_rate": 0.5,
    "curriculum": "rotational",
    "model": f"llama, {DEEP} x 32",
    "trained": "all weights",
    "lr": 0.01,
    "max_steps": 2,
}


def train(root, *, max_steps, loggers, ckpt_path=None, **settings):
    monitored = ModelCheckpoint(dirpath=root / "best", filename="best", monitor="val/exit_loss/exit_04")
    decoding = SelfSpeculativeValidation(
        exit_layers=[2], num_draft_tokens=[2], num_prompts=1, prompt_length=6, max_new_tokens=8
    )
    callbacks = [RunLogs(**settings), *curricula(), ExitQualityMonitor(), decoding, monitored]
    trainer = make_trainer(
        root,
        max_steps=max_steps,
        callbacks=[*callbacks, ThroughputMonitor(), DataMonitor()],
        val_check_interval=2,
        check_val_every_n_epoch=None,
        limit_val_batches=1,
        log_every_n_steps=1,
        logger=loggers,
    )
    module = make_module(config=tiny_config(num_layers=DEEP, vocab_size=300, max_length=128))
    trainer.fit(module, datamodule=make_data(root), ckpt_path=ckpt_path)
    trainer.save_checkpoint(root / "last.ckpt")
    return trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("logs")
    loggers = [TensorBoardLogger(root, name="board", version=""), CSVLogger(root, name="table", version="")]
    trainer = train(root, max_steps=2, loggers=loggers)
    loggers[0] = TensorBoardLogger(root, name="board", version="")  # a new process makes a new event file
    train(root, max_steps=4, loggers=loggers, ckpt_path=root / "last.ckpt")
    return root, trainer


def test_of_a_deep_model_all_loggers_get_the_same_few_metrics(run):
    root, trainer = run
    tags = set(EventAccumulator(str(root / "board")).Reload().Tags()["scalars"])
    with (root / "table" / "metrics.csv").open(newline="") as lines:
        assert set(next(csv.reader(lines))) - {"step"} == tags
    assert {"val/exit_loss/exit_10", "val/exit_acceptance/exit_05", "train/gradient_norm/block_07"} <= tags
    assert {"train/dropout_rate/block_02", "decode/speedup", "source/token_share/code"} <= tags
    assert [tag for tag in tags if is_detail(tag, DEEP)] == ["val/exit_loss/exit_04"]  # which is monitored
    left_out = set(trainer.callback_metrics) - tags
    assert {"val/exit_loss/exit_03", "train/exit_weight/exit_10", "decode/speedup/exit_02_drafts_02"} <= left_out


def test_a_model_of_24_blocks_has_about_forty_metrics_and_a_small_one_all(run):
    names = [name for name in run[1].callback_metrics if not name.endswith(tuple(f"_{n:02d}" for n in range(1, 11)))]
    kinds = {name.rsplit("/", 1)[0] for name in run[1].callback_metrics if "/exit_" in name[-8:]}
    names += [metric_names.of_exit(kind, layer) for kind in kinds for layer in range(1, 25)]
    names += [metric_names.of_block(kind, block) for kind in ("train/gradient_norm", "train/dropout_rate")
              for block in range(1, 25)]  # fmt: skip
    shown = [name for name in names if not is_detail(name, 24, range(1, 25))]
    assert len(names) > 200
    assert len(shown) <= 41
    assert not [name for name in names if is_detail(name, 8)]


@pytest.mark.parametrize(
    ("num_layers", "scored", "shown"),
    [
        (24, (), {6, 12, 18, 24}),
        (30, [2, 4, 6, 9, 12, 18, 24, 30], {6, 12, 24, 30}),
        (30, [2], {2}),
        (30, [1, 2, 30], {1, 2, 30}),
    ],
)
def test_the_depths_that_are_shown_are_measured_ones_nearest_to_the_quarters(num_layers, scored, shown):
    assert shown_depths(num_layers, scored) == shown


def test_few_scored_exits_show_all_their_figures():
    few, many = [1, 2, 30], [1, 2, 10, 20, 30]
    for name in ("val/exit_predicted_speedup/exit_01", "val/exit_kl/exit_02"):
        assert (is_detail(name, 30, few), is_detail(name, 30, many)) == (False, True)


def test_scores_of_tasks_and_parses_are_shown_at_all_their_exits():
    for stage in ("val", "test"):
        assert not is_detail(metric_names.task_score(stage, "boolq", "acc", 5), 24)
        assert not is_detail(metric_names.task_score(stage, "gsm8k", "exact_match", 5, drafts=True), 24)
        for figure, drafts in (("exact_match", None), ("speedup", 4), ("acceptance_rate", 4)):
            assert not is_detail(metric_names.parse_figure(figure, stage, 5, drafts), 24)
        for figure, drafts in (("exact_match_by_domain/alarm", None), ("exact_match", 4), ("ms_per_token", 0)):
            assert is_detail(metric_names.parse_figure(figure, stage, 6, drafts), 24)
            assert not is_detail(metric_names.parse_figure(figure, stage, 6, drafts), 8)


def test_charts_and_settings_are_in_the_runs_own_event_files_once_also_after_a_resume(run):
    root, _ = run
    files = sorted((root / "board").glob(EVENT_FILES))
    assert len(files) == 2
    assert [path for path in (root / "board").rglob("*") if path.is_dir()] == []
    values = {value.tag: value for file in files for _, value in points(file)}
    counts = Counter(value.tag for file in files for _, value in points(file))
    once = ("custom_scalars__config__", *(f"_hparams_/{part}" for part in ("experiment", "session_start_info")))
    assert [counts[tag] for tag in once] == [1, 1, 1]
    layout = Layout.FromString(values["custom_scalars__config__"].tensor.string_val[0])
    titles = [chart.title for category in layout.category for chart in category.chart]
    assert titles[0].startswith("loss by exit")
    assert {"dropout rate by depth", "acceptance, tokens a round, speedup", "tokens a second"} <= set(titles)
    start = HParamsPluginData.FromString(
        values["_hparams_/session_start_info"].metadata.plugin_data.content
    ).session_start_info
    logged = {name: value.string_value or value.number_value for name, value in start.hparams.items()}
    assert logged.items() >= SETTINGS.items()
    where = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    for folder in ("board", "table"):
        told = read_scalars(root / folder).settings
        assert told.items() >= (where | {"lr": 0.01}).items()
        assert told["device"]


def _train_as_a_rank(root, data):
    board = TensorBoardLogger(root, name="board", version="")
    callbacks = [RunLogs(), *curricula()]
    strategy = DDPStrategy(process_group_backend="gloo")
    trainer = make_trainer(root, max_steps=2, callbacks=callbacks, logger=board, devices=2, strategy=strategy)
    trainer.fit(make_module(config=tiny_config(vocab_size=300, max_length=128)), datamodule=data)


@pytest.mark.distributed
def test_of_two_ranks_one_arranges_the_board(tmp_path):
    data = make_data(tmp_path)
    data.prepare_data()
    run_ranks(_train_as_a_rank, tmp_path, data)
    (file,) = (tmp_path / "board").glob(EVENT_FILES)
    counts = Counter(value.tag for _, value in points(file))
    assert [counts[tag] for tag in ("custom_scalars__config__", "_hparams_/session_start_info")] == [1, 1]


def test_figures_sample_and_all_metrics_are_there_on_request(tmp_path):
    board = TensorBoardLogger(tmp_path, name="board", version="")
    trainer = train(tmp_path, max_steps=2, loggers=board, all_metrics=True)
    tags = EventAccumulator(str(tmp_path / "board")).Reload().Tags()
    assert set(tags["scalars"]) - {"epoch"} == set(trainer.callback_metrics)
    assert set(tags["images"]) == {"val/exits", "LayerSkip/exits", "LayerSkip/sample"}
    assert {"decode/sample/text_summary", "decode/self_speculative/text_summary"} <= set(tags["tensors"])


@pytest.mark.extras
def test_weights_and_biases_gets_offline_what_the_others_get(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    path = write_config(tmp_path, write_sources(tmp_path), max_steps=4, checkpoint_every=2, validation_rows=4)
    config = json.loads(path.read_text())
    csv_settings = {"save_dir": str(tmp_path), "name": "table", "version": ""}
    config["trainer"]["logger"] = [
        config["trainer"]["logger"],
        {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": csv_settings},
        {
            "class_path": "lightning.pytorch.loggers.WandbLogger",
            "init_args": {"save_dir": str(tmp_path), "offline": True},
        },
    ]
    config["trainer"] |= {"limit_val_batches": 1, "val_check_interval": 2, "check_val_every_n_epoch": None}
    config["trainer"]["callbacks"] = [{"class_path": "callbacks.ExitQualityMonitor"}]
    path.write_text(json.dumps(config))
    assert cli(monkeypatch, "fit", "--config", str(path)) == 0
    import wandb

    wandb.finish()
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    give_up = monotonic() + 60
    while (read := read_offline_run(file)) is None and monotonic() < give_up:
        sleep(0.1)  # another process writes the file, and may do so after finish
    logged, settings = read
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    tags = events.Tags()["scalars"]
    assert set(logged) == set(tags)
    for tag in tags:
        assert logged[tag] == {point.step: pytest.approx(point.value) for point in events.Scalars(tag)}, tag
    with (tmp_path / "table" / "metrics.csv").open(newline="") as lines:
        assert set(next(csv.reader(lines))) - {"step"} == set(tags)
    assert settings["curriculum"] == "rotational"


def test_a_first_logger_whose_runs_share_a_folder_is_told(tmp_path, caplog):
    table = CSVLogger(tmp_path, name="table", version="")
    for loggers in ([DummyLogger(), table], [table, DummyLogger()]):
        warn_of_shared_folder(make_trainer(tmp_path, max_steps=1, callbacks=[], logger=loggers))
    told = [message for message in caplog.messages if "whose runs share the folder" in message]
    assert len(told) == 1
    assert f"DummyLogger comes first, whose runs share the folder {tmp_path}" in told[0]


def read_offline_run(file):
    """Return what a W&B run logged, by name and step, and its settings; None before its end is in the file.

    The file is a log of blocks of 32 KiB.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, record = file.read_bytes(), 7, b""  # behind the file's own header
    logged, settings, has_ended = defaultdict(dict), {}, False
    while position + 7 <= len(content):
        if (left := 2**15 - position % 2**15) < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        if position + 7 + length > len(content):  # it is being written
            break
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or its last part
            found, record = Record.FromString(record), b""
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in found.history.item}
            for name, value in items.items():
                if not name.startswith("_") and name != "trainer/global_step":
                    logged[name][items["trainer/global_step"]] = value
            for change in (*found.run.config.update, *found.config.update):
                settings[change.key or "/".join(change.nested_key)] = json.loads(change.value_json)
            has_ended |= found.HasField("exit")
    return (logged, settings) if has_ended else None
