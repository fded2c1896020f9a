"""TaskEvaluation gives in validate and test what `layerskip evaluate` gives, and fits go on undisturbed."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from app.errors import ConfigError
from app.evaluation.evaluate import chosen_tasks, evaluate, prepare
from app.evaluation.records import EvaluatedModel, EvaluationSettings
from app.evaluation.results import results_of
from app.spans.decoder import SpanDecoder
from callbacks import RunLogs, TaskEvaluation
from callbacks.tensorboard import EVENT_FILES, points
from tests.support.decoding_modules import DecodingModule, quiet_trainer, random_rows
from tests.support.processes import run_ranks
from tests.support.tokenizers import byte_level

ROWS = [{"question": text, "passage": text, "answer": text == "more"} for text in ("the end", "more", "x = 1")]


class _Data(LightningDataModule):
    tokenizer = byte_level()

    def train_dataloader(self):
        return random_rows(4, vocab_size=330)

    val_dataloader = test_dataloader = train_dataloader


def _module():
    return DecodingModule(vocab_size=330, max_length=64)


@pytest.fixture
def callback(tmp_path):
    (tmp_path / "boolq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return TaskEvaluation(tasks=[f"boolq={tmp_path / 'boolq.jsonl'}"], exit_layers=[2, 4], every_n_validations=2)


def _trainer(folder, *callbacks, **settings):
    logger = TensorBoardLogger(folder, name="run", version="")
    return quiet_trainer(folder, *callbacks, logger=logger, log_every_n_steps=1, **settings)


def _charts(folder):
    """The charts of the tab Custom Scalars, each with the patterns of its tags."""
    layouts = [v for file in folder.glob(EVENT_FILES) for _, v in points(file) if v.tag == "custom_scalars__config__"]
    layout = Layout.FromString(layouts[-1].tensor.string_val[0])
    return {chart.title: chart.multiline.tag for category in layout.category for chart in category.chart}


def test_test_writes_scores_table_and_figure_and_goes_on_where_it_was_stopped(tmp_path, callback, monkeypatch):
    module, trainer = _module(), _trainer(tmp_path, callback, RunLogs())
    (metrics,) = trainer.test(module, datamodule=_Data(), verbose=False)
    records = []
    settings = EvaluationSettings(exit_layers=[2, 4])
    work = prepare(
        chosen_tasks([f"boolq={tmp_path / 'boolq.jsonl'}"]), settings, tokenizer=_Data.tokenizer, max_length=64
    )
    module.eval()
    evaluate(EvaluatedModel(SpanDecoder(module.model), _Data.tokenizer, ()), work, settings, on_record=records.append)
    expected = {each.exit_layer: each.score for each in results_of(records) if each.metric == "acc"}
    assert metrics == {
        f"test/task/boolq/acc/exit_{layer:02d}": pytest.approx(score) for layer, score in expected.items()
    }
    document = json.loads((tmp_path / "run" / "tasks_test.json").read_text())
    assert [each["score"] for each in document["results"] if each["metric"] == "acc"] == [expected[2], expected[4]]
    assert (document["step"], document["settings"]["exit_layers"]) == (None, [2, 4])
    assert {file.suffix for file in (tmp_path / "run").glob("tasks_test.*")} == {".json", ".csv", ".png", ".jsonl"}
    logged = EventAccumulator(str(tmp_path / "run")).Reload().Tags()
    assert logged["images"] == ["tasks/test"]
    assert "tasks/test/text_summary" in logged["tensors"]
    charts = _charts(tmp_path / "run")
    assert all(re.match(charts["task/boolq/acc"][0], tag) for tag in metrics)
    assert "loss by exit (nats a token)" in charts
    assert [row[0] for row in callback.report().rows] == ["exit 2", "exit 4, full model", "guessing"]

    def fails(*args):
        raise AssertionError("it was done before")

    monkeypatch.setattr("app.evaluation.likelihood_tasks.log_probabilities", fails)
    assert _trainer(tmp_path, callback).test(module, datamodule=_Data(), verbose=False) == [metrics]


def test_a_fit_scores_every_second_validation_and_trains_the_same_with_and_without(tmp_path, callback):
    weights = []
    for callbacks in ([callback, RunLogs()], []):
        module, trainer = _module(), _trainer(tmp_path, *callbacks, max_epochs=3, num_sanity_val_steps=1)
        trainer.fit(module, datamodule=_Data())
        weights.append(module.model.state_dict())
        if callbacks:
            assert "val/task/boolq/acc/exit_02" in trainer.callback_metrics
            assert json.loads((tmp_path / "run" / "tasks_validate.json").read_text())["step"] == 4  # of 6
            assert not [*(tmp_path / "run").glob("*.examples.jsonl")]
            assert {"dropout rate by depth", "task/boolq/acc"} <= set(_charts(tmp_path / "run"))
    assert all(torch.equal(one, two) for one, two in zip(*(each.values() for each in weights), strict=True))
    assert callback.state_dict() == {"validations": 3}


def _test_as_a_rank(folder, callback):
    """Metrics of this rank, the rows that it scored itself, and the table that it reports."""
    scored, score = [], callback._score
    callback._score = lambda *args: scored.append(score(*args)) or scored[-1]
    strategy = DDPStrategy(process_group_backend="gloo")
    trainer = _trainer(folder, callback, devices=2, strategy=strategy, use_distributed_sampler=False)
    (metrics,) = trainer.test(_module(), datamodule=_Data(), verbose=False)
    return metrics, sorted(record.row for record in scored[0]), callback.report()


@pytest.mark.distributed
def test_two_ranks_share_the_rows_and_find_what_one_process_finds(tmp_path, callback):
    (metrics,) = _trainer(tmp_path / "one", callback).test(_module(), datamodule=_Data(), verbose=False)
    ranks = run_ranks(_test_as_a_rank, tmp_path / "two", callback)
    assert [rows for _, rows, _ in ranks] == [[0, 2], [1]]
    assert [(found, table) for found, _, table in ranks] == 2 * [(pytest.approx(metrics), callback.report())]
    one, two = (json.loads((tmp_path / name / "run" / "tasks_test.json").read_text()) for name in ("one", "two"))
    assert two["rows"]["boolq"]["scored"] == 3
    assert two["results"] == one["results"]


def test_rows_that_are_all_too_long_end_nothing(tmp_path):
    (tmp_path / "boolq.jsonl").write_text(json.dumps(ROWS[0] | {"passage": "word " * 99}) + "\n")
    callback = TaskEvaluation(tasks=[f"boolq={tmp_path / 'boolq.jsonl'}"], on_long="skip")
    assert _trainer(tmp_path, callback).test(_module(), datamodule=_Data(), verbose=False) == [{}]
    assert json.loads((tmp_path / "run" / "tasks_test.json").read_text())["rows"]["boolq"]["skipped"] == 1


def test_what_cannot_be_measured_is_refused_before_anything_runs(tmp_path, callback):
    trainer = SimpleNamespace(datamodule=_Data())
    with pytest.raises(ConfigError, match="model: got 'LightningModule', allowed a module with exitable_decoder"):
        callback.setup(trainer, LightningModule(), "fit")
    with pytest.raises(ConfigError, match="data: got 'LightningDataModule', allowed a datamodule with a tokenizer"):
        callback.setup(SimpleNamespace(datamodule=LightningDataModule()), _module(), "fit")
    callback.setup(SimpleNamespace(datamodule=None), LightningModule(), "predict")
    for settings, message in (
        ({"exit_layers": [5]}, r"exit_layers: got \[5\]"),
        ({"num_shots": 1}, "num_shots: got 1"),
    ):
        given = TaskEvaluation(tasks=[f"boolq={tmp_path / 'boolq.jsonl'}"], **settings)
        with pytest.raises(ConfigError, match=message):
            given.setup(trainer, _module(), "fit")
    with pytest.raises(ConfigError, match="tasks: got 'boolk'"):
        TaskEvaluation(tasks=["boolk"])
