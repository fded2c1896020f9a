"""Validation, its monitors, and the promise that they leave training as it was."""

import itertools
import json
import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, default_collate

from app.errors import CheckpointError
from callbacks import (
    ExitQualityMonitor,
    LastCheckpoint,
    LayerSkipProgressBar,
    PredictionWriter,
    SelfSpeculativeValidation,
    ThroughputMonitor,
)
from tests.support.runs import NUM_LAYERS, Recorder, curricula, make_data, make_module, make_trainer


def decoding(**settings):
    defaults = {
        "exit_layers": [1, 2],
        "num_draft_tokens": [2],
        "num_prompts": 2,
        "prompt_length": 6,
        "max_new_tokens": 6,
    }
    return SelfSpeculativeValidation(**(defaults | settings))


def train(root, *extra, val=True):
    recorder, module = Recorder(), make_module()
    trainer = make_trainer(
        root,
        max_steps=6,
        callbacks=[*curricula(), recorder, *extra],
        val_check_interval=2,
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if val else 0,
    )
    trainer.fit(module, datamodule=make_data(root))
    state = torch.random.get_rng_state()
    return recorder.steps, {name: p.detach().clone() for name, p in module.named_parameters()}, state


def test_validation_monitors_and_decoding_leave_training_bit_identical(tmp_path):
    torch.manual_seed(0)
    bare_steps, bare, bare_state = train(tmp_path, val=False)
    torch.manual_seed(0)
    callback = decoding()
    steps, watched, state = train(tmp_path, ExitQualityMonitor(), callback, ThroughputMonitor(every_n_steps=2))
    assert callback.report() is not None  # it did decode
    assert steps == bare_steps
    assert all(torch.equal(bare[name], watched[name]) for name in bare)
    assert torch.equal(state, bare_state)


@pytest.fixture(scope="module")
def watched_run(tmp_path_factory):
    root = tmp_path_factory.mktemp("watched")
    monitor, callback = ExitQualityMonitor(), decoding(every_n_validations=2)
    module = make_module()
    trainer = make_trainer(
        root,
        max_steps=8,
        callbacks=[*curricula(), monitor, callback, ThroughputMonitor(every_n_steps=2)],
        val_check_interval=2,
        check_val_every_n_epoch=None,
        limit_val_batches=1.0,
        log_every_n_steps=1,
        logger=TensorBoardLogger(root, name="run", version=""),
    )
    trainer.fit(module, datamodule=make_data(root))
    events = EventAccumulator(str(root / "run"))
    events.Reload()
    return module, monitor, callback, events


def test_every_exit_has_loss_perplexity_and_agreement_in_tensorboard(watched_run):
    *_, events = watched_run
    tags = events.Tags()["scalars"]
    for layer in range(1, NUM_LAYERS + 1):
        kinds = ["loss", "perplexity", "agreement", "kl", "acceptance"]
        for kind in kinds + (["predicted_speedup"] if layer < NUM_LAYERS else []):
            assert len(events.Scalars(f"val/exit_{kind}/exit_{layer:02d}")) == 4
    for tag in ("val/loss", "val/loss/code", "train/loss", "throughput/tokens_per_second", "memory/peak_gib"):
        assert tag in tags
    assert events.Scalars("val/exit_agreement/exit_04")[-1].value == 1.0
    assert "val/exit_predicted_speedup/exit_04" not in tags
    assert events.Scalars("val/loss")[-1].value == pytest.approx(
        events.Scalars("val/exit_loss/exit_04")[-1].value, rel=1e-5
    )


def test_an_exits_training_loss_is_told_of_the_steps_at_which_it_was_on_alone(watched_run):
    *_, events = watched_run
    on = {
        layer: [event.step for event in events.Scalars(f"train/exit_weight/exit_{layer:02d}") if event.value]
        for layer in range(1, NUM_LAYERS + 1)
    }
    assert len({len(steps) for steps in on.values() if steps}) > 1
    for layer, steps in on.items():
        tag = f"train/exit_loss/exit_{layer:02d}"
        assert ([event.step for event in events.Scalars(tag)] if tag in events.Tags()["scalars"] else []) == steps


def test_figure_and_decoding_table_are_in_tensorboard(watched_run):
    *_, events = watched_run
    assert "val/exits" in events.Tags()["images"]
    assert len(events.Images("val/exits")) >= 1
    assert any("self_speculative" in tag for tag in events.Tags()["tensors"])


def test_share_of_blocks_saved_is_the_share_that_was_dropped(watched_run):
    *_, events = watched_run
    saved = [event.value for event in events.Scalars("throughput/blocks_saved_share")]
    assert 0.05 < sum(saved) / len(saved) < 0.5  # mean rate is 0.5 * mean D(l) = 0.21


def test_decoding_is_identical_in_every_setting_and_measured_every_second_validation(watched_run):
    _, _, callback, events = watched_run
    assert len(events.Scalars("decode/identical_share")) == 2
    counts = [row[-1].split(" of ") for row in callback.report().rows]
    assert all(int(same) == int(count) > 0 for same, count in counts)
    assert len(callback.report().rows) == 2


def test_logged_weights_sum_to_one_at_every_step(watched_run):
    *_, events = watched_run
    series = [events.Scalars(f"train/exit_weight/exit_{layer:02d}") for layer in range(1, NUM_LAYERS + 1)]
    for of_step in zip(*series, strict=True):
        assert sum(event.value for event in of_step) == pytest.approx(1.0)


def test_history_survives_a_checkpoint(watched_run):
    _, monitor, *_ = watched_run
    copy = ExitQualityMonitor()
    copy.load_state_dict(monitor.state_dict())
    assert copy.history == monitor.history
    assert sorted(copy.history) == [2, 4, 6, 8]
    assert not math.isnan(copy.history[8][1].acceptance)
    copy.load_state_dict({"history": {2: {1: (3.0, 0.5)}}})  # of a run that measured loss and agreement alone
    assert copy.history[2][1][:2] == (3.0, 0.5)
    for wrong in ((3.0, 0.5, 0.1), (3.0, 0.5, 0.1, "x")):
        with pytest.raises(CheckpointError, match="loss, agreement, KL and acceptance"):
            copy.load_state_dict({"history": {2: {1: wrong}}})


@pytest.mark.parametrize(("sanity_steps", "first_step"), [(-1, 0), (1, 2)])
def test_history_starts_before_training_when_all_rows_are_validated_first(tmp_path, sanity_steps, first_step):
    monitor, module = ExitQualityMonitor(), make_module()
    settings = {"val_check_interval": 2, "check_val_every_n_epoch": None, "limit_val_batches": 1.0}
    trainer = make_trainer(
        tmp_path, max_steps=2, callbacks=[*curricula(), monitor], num_sanity_val_steps=sanity_steps, **settings
    )
    trainer.fit(module, datamodule=make_data(tmp_path))
    assert min(monitor.history) == first_step
    if first_step == 0:
        assert monitor.history[0][NUM_LAYERS].loss > monitor.history[2][NUM_LAYERS].loss


def test_validate_test_and_predict_work_on_the_trained_module(watched_run, tmp_path):
    module, monitor, *_ = watched_run
    callbacks = [ExitQualityMonitor(), decoding(), PredictionWriter()]
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=callbacks, limit_val_batches=1.0)
    data = make_data(tmp_path)
    (validated,) = trainer.validate(module, datamodule=data, verbose=False)
    assert validated["val/exit_loss/exit_02"] == pytest.approx(monitor.history[8][2].loss, rel=1e-4)
    assert validated["decode/identical_share"] == 1.0
    (tested,) = trainer.test(module, datamodule=data, verbose=False)
    assert tested["test/loss"] == pytest.approx(validated["val/loss"], rel=1e-6)
    trainer.predict(module, datamodule=data, return_predictions=False)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert set(rows[0]["loss_by_exit"]) == {str(layer) for layer in range(1, NUM_LAYERS + 1)}
    mean = sum(row["loss_by_exit"]["4"] for row in rows) / len(rows)
    assert mean == pytest.approx(validated["val/loss"], rel=0.05)  # rows weigh alike here, tokens there
    overflowed = {"loss_by_exit": {4: torch.tensor([torch.nan])}, "source": torch.tensor([0])}
    callbacks[-1].write_on_batch_end(trainer, module, overflowed, None, None, batch_idx=9, dataloader_idx=0)
    last = (tmp_path / "predictions.jsonl").read_text().splitlines()[-1]
    assert last == '{"batch": 9, "row": 0, "source": 0, "loss_by_exit": {"4": null}}'


def test_exit_the_model_does_not_have_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"exit_layers: got \[2, 9\], allowed one or several of 1..4"):
        train(tmp_path, ExitQualityMonitor(exit_layers=[2, 9]))


def test_progress_bar_shows_loss_exits_and_throughput(tmp_path):
    seen = []

    class Bar(LayerSkipProgressBar):
        def get_metrics(self, trainer, pl_module):
            seen.append(super().get_metrics(trainer, pl_module))
            return seen[-1]

    trainer = make_trainer(
        tmp_path,
        max_steps=4,
        callbacks=[*curricula(), ThroughputMonitor(every_n_steps=1), Bar()],
        enable_progress_bar=True,
    )
    trainer.fit(make_module(), datamodule=make_data(tmp_path))
    assert {"train/loss", "exits", "tok/s"} <= set(seen[-1])
    assert seen[-1]["exits"].endswith(str(NUM_LAYERS))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_window_of_throughput_is_told_once_and_ends_where_lightning_logs(accumulate, tmp_path, monkeypatch):
    clock = itertools.accumulate(itertools.count(1))  # the n-th reading is n later than the one before
    monkeypatch.setattr("callbacks.throughput_monitor.time.perf_counter", lambda: float(next(clock)))
    for name, max_steps, ckpt_path in (("first", 3, None), ("second", 7, tmp_path / "third.ckpt")):
        trainer = make_trainer(
            tmp_path,
            max_steps=max_steps,
            callbacks=[*curricula(), ThroughputMonitor()],
            accumulate_grad_batches=accumulate,
            log_every_n_steps=2,
            logger=TensorBoardLogger(tmp_path, name=name, version=""),
        )
        trainer.fit(make_module(), datamodule=make_data(tmp_path), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / "third.ckpt")
    events = EventAccumulator(str(tmp_path / "second"))
    events.Reload()
    told = events.Scalars("throughput/tokens_per_second")
    assert [event.step for event in told] == [3, 5]
    assert told[0].value > told[1].value  # of that clock


class Clock(Callback):
    """On it a step takes 0.25 s, a batch of data 1 s, a checkpoint 10 s, a validation 100 s."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def collate(self, rows):
        self.now += 1.0
        return default_collate(rows)

    def on_before_zero_grad(self, *_):
        self.now += 0.25

    def on_save_checkpoint(self, *_):
        self.now += 10.0

    def on_validation_epoch_end(self, *_):
        self.now += 100.0


class Told(Callback):
    """The throughput of every step."""

    def __init__(self):
        self.rates, self.shares = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.rates.append(trainer.callback_metrics["throughput/tokens_per_second"].item())
        self.shares.append(trainer.callback_metrics["throughput/data_wait_share"].item())


def test_waiting_for_data_and_checkpoints_counts_and_validation_does_not(tmp_path, monkeypatch):
    clock, told = Clock(), Told()
    monkeypatch.setattr("callbacks.throughput_monitor.time", clock)
    rows = [{"input_ids": torch.arange(idx, idx + 24), "labels": torch.arange(idx + 1, idx + 25)} for idx in range(24)]
    loader = DataLoader(rows, batch_size=4, collate_fn=clock.collate)
    trainer = make_trainer(
        tmp_path,
        max_steps=6,
        callbacks=[ThroughputMonitor(every_n_steps=1), told, clock, LastCheckpoint(every_n_train_steps=4)],
        val_check_interval=2,
        limit_val_batches=1,
    )
    trainer.fit(make_module(), loader, loader)
    assert told.rates == pytest.approx([96 / seconds for seconds in (1.25, 1.25, 1.25, 1.25, 11.25, 1.25)])
    assert told.shares == pytest.approx([0.8] * 6)


def flops_per_token(root, *, max_dropout_rate):
    logged = []

    class Read(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            logged.append({name: value.item() for name, value in trainer.callback_metrics.items()})

    callbacks = [*curricula(curriculum="none", max_dropout_rate=max_dropout_rate)]
    callbacks += [ThroughputMonitor(every_n_steps=1, peak_flops=1e9), Read()]
    trainer = make_trainer(root, max_steps=6, callbacks=callbacks)
    trainer.fit(make_module(), datamodule=make_data(root))
    last = logged[-1]
    return (
        last["throughput/model_flops_utilisation"] * 1e9 / last["throughput/tokens_per_second"],
        last["throughput/blocks_saved_share"],
        [metrics["throughput/blocks_skipped_share"] for metrics in logged],
    )


def test_model_flops_utilisation_counts_what_was_computed(tmp_path):
    whole, saved, skipped = flops_per_token(tmp_path, max_dropout_rate=0.0)
    module = make_module()
    module.configure_model()
    matrices = sum(p.numel() for p in module.parameters() if p.dim() > 1)  # the embedding counts as the tied head
    attention = (
        4 * 24 * 32 * NUM_LAYERS
    )  # two products of 24 positions and width 32; their backward takes 2.5 times that
    assert whole == pytest.approx(6 * matrices + 3.5 * attention, rel=1e-4)
    assert saved == max(skipped) == 0
    less, saved, skipped = flops_per_token(tmp_path, max_dropout_rate=0.9)
    assert 0 < saved < 1
    assert less < whole * (1 - 0.5 * saved)
    assert max(skipped) >= 1 / NUM_LAYERS


def test_steps_in_tensorboard_go_on_where_a_run_ended_with_a_validation(tmp_path):
    settings = {"val_check_interval": 2, "check_val_every_n_epoch": None, "limit_val_batches": 1.0}
    for name, max_steps, ckpt_path in (("first", 4, None), ("second", 8, tmp_path / "checkpoints" / "last.ckpt")):
        trainer = make_trainer(
            tmp_path,
            max_steps=max_steps,
            callbacks=[*curricula(), LastCheckpoint(dirpath=str(tmp_path / "checkpoints"), every_n_train_steps=2)],
            log_every_n_steps=1,
            logger=TensorBoardLogger(tmp_path, name=name, version=""),
            **settings,
        )
        trainer.fit(make_module(), datamodule=make_data(tmp_path), ckpt_path=ckpt_path)
    events = EventAccumulator(str(tmp_path / "second"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [4, 5, 6, 7]
    assert [event.step for event in events.Scalars("val/loss")] == [5, 7]
