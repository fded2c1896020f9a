"""Exit blocks that learn from a frozen model: every loss teaches, nothing else moves, and a killed run goes on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from app.checkpoints.weights import EXIT_BLOCKS_KEY, EXIT_BLOCKS_PREFIX
from app.errors import ConfigError, DataError
from app.model import head_loss
from app.model.early_exit import EarlyExitModel
from app.model.weights_hash import weights_hash
from app.training.exit_block_settings import ExitBlockSettings
from app.training.module import LayerSkipModule
from callbacks import EarlyExitCurriculum, ExitQualityMonitor, LayerDropoutCurriculum, ThroughputMonitor
from datamodules import CachedStatesDataModule, TextCodeDataModule
from tests.integration.test_resume import StopAfter
from tests.support.runs import Recorder, cli, make_data, make_module, make_trainer, write_trained

CONFIGS = Path(__file__).parents[2] / "configs"
EXITS = {1: 1, 2: 0}
STEPS = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_trained(tmp_path_factory.mktemp("exit_blocks"), max_steps=80)


def make_exit_blocks(root, *, exits=None, lr=1e-2, **settings: Any) -> LayerSkipModule:
    return LayerSkipModule(
        pretrained=str(root / "model.ckpt"),
        exit_blocks=ExitBlockSettings(exits or EXITS, **settings),
        optimizer=lambda params: torch.optim.AdamW(params, lr=lr),
        lr_schedule="constant",
    )


class Modes(Callback):
    """Whether the frozen model and the exit blocks were in training mode at the latest step."""

    def on_fit_start(self, trainer, pl_module):
        self.works = []
        pl_module.watch_work(self.works.append)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.frozen_trains = any(module.training for module in pl_module.model.modules())
        self.blocks_train = all(module.training for module in pl_module.exit_blocks.modules())


@pytest.mark.parametrize("loss", ["lk", "kl", "total_variation", "cross_entropy"])
def test_every_loss_raises_agreement_and_moves_nothing_but_the_exit_blocks(root, tmp_path, loss):
    monitor, modes, recorder = ExitQualityMonitor(exit_layers=[1, 2, 3, 4]), Modes(), Recorder()
    trainer = make_trainer(
        tmp_path,
        max_steps=40,
        callbacks=[monitor, modes, recorder],
        limit_val_batches=1.0,
        num_sanity_val_steps=-1,
        check_val_every_n_epoch=None,
        val_check_interval=20,
    )
    module = make_exit_blocks(root, start="last", loss=loss)
    plain = LayerSkipModule.load_from_checkpoint(root / "model.ckpt")
    trainer.fit(module, datamodule=make_data(root))
    before, after = monitor.history[0], monitor.history[40]
    assert (before[3], before[4]) == (after[3], after[4])  # they have no blocks of their own
    assert after[1].agreement > before[1].agreement + 0.05  # 0.08 to 0.2, by loss and processor
    assert after[2].loss < before[2].loss  # a norm alone learns little
    losses = [step["loss"] for step in recorder.steps]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert [step["exits"] for step in recorder.steps] == [((1, 0.5), (2, 0.5))] * 40
    assert (modes.frozen_trains, modes.blocks_train) == (False, True)
    assert [work.exit_weights for work in modes.works] == [((1, 0.5), (2, 0.5))] * 40
    frozen = module.model.state_dict()
    assert all(torch.equal(frozen[name], tensor) for name, tensor in plain.model.state_dict().items())
    assert not any(p.requires_grad for p in module.model.parameters())
    moved = zip(module.exit_blocks.parameters(), make_built(root).exit_blocks.parameters(), strict=True)
    assert not any(torch.equal(ours, start) for ours, start in moved)


def make_built(root):
    module = make_exit_blocks(root, start="last")
    module.configure_model()
    return module


def train(root, folder, *, until=STEPS, ckpt_path=None, start="exit", data=None, **settings):
    """Steps of a run of STEPS up to `until`; losses, exit blocks, the figures of a validation, and the checkpoint."""
    recorder, monitor = Recorder(), ExitQualityMonitor(exit_layers=[1, 2])
    saver = ModelCheckpoint(dirpath=folder, every_n_train_steps=STEPS // 2, save_top_k=-1)
    trainer = make_trainer(folder, max_steps=STEPS, callbacks=[recorder, monitor, saver], **settings)
    if until < STEPS:
        trainer.callbacks.append(StopAfter(until))
    module = make_exit_blocks(root, start=start, start_tokens=150)
    trainer.fit(module, datamodule=data or make_data(root), ckpt_path=ckpt_path)
    weights = {name: p.detach().clone() for name, p in module.exit_blocks.named_parameters()}
    return recorder.steps, weights, saver.best_model_path


def test_a_loss_over_a_draft_vocabulary_takes_the_rows_of_these_tokens_alone(root, tmp_path, monkeypatch):
    (file := tmp_path / "ids.json").write_text(json.dumps([*range(90)]))
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[], limit_val_batches=0)
    module = make_exit_blocks(root, exits={1: 1}, vocabulary=str(file))
    shapes, losses = [], head_loss.token_losses

    def watched(hidden, weight, *rest, **more):
        shapes.append(len(weight))
        return losses(hidden, weight, *rest, **more)

    monkeypatch.setattr(head_loss, "token_losses", watched)
    trainer.fit(module, datamodule=make_data(root))
    assert shapes == [90]
    assert module.exitable_decoder().draft_vocabulary == tuple(range(90))
    size, vocab_size = module.draft_size(1), module.config.vocab_size
    assert size.draft_head_blocks == pytest.approx(size.head_blocks * 90 / vocab_size)
    file.write_text(json.dumps([*range(1, 90)]))
    with pytest.raises(DataError, match="id 0, which ends a text, is not among its ids"):
        make_exit_blocks(root, exits={1: 1}, vocabulary=str(file)).configure_model()


@pytest.mark.parametrize("start", ["exit", "affine"])
def test_a_resumed_run_equals_the_uninterrupted_one_and_its_checkpoint_tells_what_it_has(root, tmp_path, start):
    settings = {"accumulate_grad_batches": 2, "start": start}
    whole, weights, _ = train(root, tmp_path / "whole", **settings)
    first, _, saved = train(root, tmp_path / "parts", until=STEPS // 2, **settings)
    second, resumed, _ = train(root, tmp_path / "parts", ckpt_path=saved, **settings)
    assert first + second == whole
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    content = torch.load(saved, weights_only=True)
    assert content[EXIT_BLOCKS_KEY] == {1: [1], 2: []}
    trained = {name.removeprefix(EXIT_BLOCKS_PREFIX) for name in content["state_dict"] if "exit_blocks" in name}
    assert trained == {*weights}
    assert len(content["optimizer_states"][0]["state"]) == len(weights)


def test_an_affine_start_is_the_least_squares_map_on_the_first_tokens_of_training(root, tmp_path):
    monitor, module = (
        ExitQualityMonitor(exit_layers=[1]),
        make_exit_blocks(root, start="affine", start_tokens=500, lr=0),
    )
    settings = {"num_sanity_val_steps": -1, "limit_val_batches": 1.0, "check_val_every_n_epoch": None}
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[monitor], val_check_interval=1, **settings)
    trainer.fit(module, datamodule=make_data(root))
    network, pairs = module._network, []
    module.model.eval()
    for batch in make_data(root).train_dataloader():
        learned = batch["labels"].flatten() != -100
        with torch.no_grad():
            states = network.states(batch["input_ids"], batch["position_ids"], [1])
        pairs.append([states[layer].flatten(0, 1)[learned] for layer in (1, 4)])
        if sum(len(entering) for entering, _ in pairs) >= 500:
            break
    entering, final = (torch.cat(column)[:500].double() for column in zip(*pairs, strict=True))
    known = torch.cat([entering, torch.ones(500, 1)], dim=1)
    solution = torch.linalg.lstsq(known, final).solution
    found, gain = module.own_blocks[1].decoder.norm, module.model.model.norm.weight
    torch.testing.assert_close(found.linear.weight * gain[:, None], solution[:-1].t().float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.linear.bias * gain, solution[-1].float(), rtol=1e-3, atol=1e-4)
    assert monitor.history[0][1] == monitor.history[1][1]  # the start is there before the first validation


class OnLine(Callback):
    """The loss of each micro-batch as its states give it, and as a pass of the frozen model does."""

    def __init__(self):
        self.pairs = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        without = {name: column for name, column in batch.items() if name != "states"}
        self.pairs.append([pl_module.exit_block_loss(each).weighted_sum.item() for each in (batch, without)])


class ExitsReturned(Callback):
    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.exits = {*outputs["hidden_by_exit"]}


def test_cached_states_stand_for_the_pass_through_the_frozen_model(root, tmp_path, monkeypatch):
    pretrained = str(root / "model.ckpt")
    cached = {"pretrained": pretrained, "exit_layers": [1, 2], "num_tokens": 400, "batch_size": 4, "dtype": "float32"}
    data = CachedStatesDataModule(corpus=make_data(root), cache_dir=str(tmp_path / "states"), **cached)
    on_line, monitor = OnLine(), ExitQualityMonitor(exit_layers=[1, 2])
    hashed = []
    counted = lambda *args, **settings: hashed.append(1) or weights_hash(*args, **settings)  # noqa: E731
    monkeypatch.setattr("app.training.exit_block_steps.weights_hash", counted)
    trainer = make_trainer(tmp_path, max_steps=2, callbacks=[on_line, monitor], limit_val_batches=1.0)
    module = make_exit_blocks(root)
    trainer.fit(module, datamodule=data)
    assert all(ours == pytest.approx(theirs, rel=1e-5) for ours, theirs in on_line.pairs)
    assert len(hashed) == len(module._loops_checked)  # at the first batch of a loop alone
    one_of_two = OnLine()
    make_trainer(tmp_path, max_steps=1, callbacks=[one_of_two]).fit(make_exit_blocks(root, exits={2: 1}), data)
    (pair,) = one_of_two.pairs  # a cache may hold more exits than are trained
    assert pair[0] == pytest.approx(pair[1], rel=1e-5)
    cached_scores = trainer.validate(module, datamodule=data, verbose=False)[0]
    scores = trainer.validate(module, datamodule=make_data(root), verbose=False)[0]
    assert cached_scores == pytest.approx(scores, rel=1e-4)
    plain = LayerSkipModule.load_from_checkpoint(pretrained)
    third = make_trainer(tmp_path, max_steps=1, callbacks=[ExitQualityMonitor(exit_layers=[3])], limit_val_batches=1.0)
    ours, theirs = (third.validate(each, datamodule=make_data(root), verbose=False)[0] for each in (module, plain))
    assert ours["val/exit_loss/exit_03"] == theirs["val/exit_loss/exit_03"]  # which has no blocks of its own

    returned = ExitsReturned()
    settings = {"limit_val_batches": 1, "val_check_interval": 1, "check_val_every_n_epoch": None}
    monitored = make_trainer(
        tmp_path, max_steps=1, callbacks=[ExitQualityMonitor(exit_layers=[1]), returned], **settings
    )
    with monkeypatch.context() as patched:
        patched.setattr(EarlyExitModel, "states", None)  # the frozen model does not run
        monitored.fit(make_exit_blocks(root), datamodule=data)
    assert returned.exits == {1, 4}  # exit 2 has blocks, but nobody asked for it
    other = {"exit_layers": [2]}
    data = CachedStatesDataModule(corpus=make_data(root), cache_dir=str(tmp_path / "other"), **(cached | other))
    with pytest.raises(ConfigError, match=r"data.exit_layers: got \[2\], allowed .*\[1, 2\]"):
        make_trainer(tmp_path, max_steps=1, callbacks=[]).fit(make_exit_blocks(root), datamodule=data)


class ForeignStates(TextCodeDataModule):
    """States of the right shape, of nobody knows which model."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        return batch | {"states": torch.zeros(*batch["input_ids"].shape, self.num_states, 32)}

    num_states = 3


class StatesOfAnother(ForeignStates):
    state_layers, model_hash = (1, 2), "0" * 64


class StatesOfOneExit(StatesOfAnother):
    num_states = 2


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (ForeignStates, "batch.states: got .of ForeignStates.*StateOwner"),
        (StatesOfAnother, "data.pretrained: got .states of model 000000000000."),
        (StatesOfOneExit, r"batch.states: got .float32 \(4, 24, 2, 32\).*\(4, 24, 3, 32\)"),
    ],
)
def test_states_that_are_not_this_model_s_are_refused(root, tmp_path, kind, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path, max_steps=1, callbacks=[]).fit(
            make_exit_blocks(root), datamodule=make_data(root, kind=kind)
        )


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (LayerDropoutCurriculum(max_dropout_rate=0.5), "layer_dropout.max_dropout_rate: got 0.5, allowed 0 with"),
        (ThroughputMonitor(peak_flops=1e12), "peak_flops: got .*, allowed null with model.exit_blocks"),
        (EarlyExitCurriculum(curriculum="gradual"), "early_exit.curriculum: got .*, allowed none with"),
    ],
)
def test_the_recipe_is_refused_where_the_model_is_frozen(root, tmp_path, callback, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path, max_steps=1, callbacks=[callback]).fit(make_exit_blocks(root), make_data(root))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exits": {}}, "exit_blocks.exits: got {}"),
        ({"exits": {1: 1}, "loss": "mse"}, "exit_blocks.loss: got 'mse'"),
        (
            {"exits": {1: 1}, "loss": "cross_entropy", "vocabulary": "x.json"},
            "exit_blocks.vocabulary: got 'x.json'",
        ),
        ({"exits": {1: 1}, "start": "affine", "start_tokens": 0}, "exit_blocks.start_tokens: got 0"),
        ({"exits": {1: 1}, "start": "first"}, "exit_blocks.start: got 'first'"),
    ],
)
def test_settings_that_do_not_exist_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ExitBlockSettings(**settings)


def test_exit_blocks_need_a_trained_model_that_has_the_exit(root):
    with pytest.raises(ConfigError, match=r"config: got .llama.*model.pretrained"):
        make_module(exit_blocks=ExitBlockSettings({1: 1}))
    for setting in ("compile_blocks", "activation_checkpointing"):
        with pytest.raises(ConfigError, match=f"{setting}: got True"):
            LayerSkipModule(
                pretrained=str(root / "model.ckpt"), exit_blocks=ExitBlockSettings({1: 1}), **{setting: True}
            )
    with pytest.raises(ConfigError, match=r"exit_blocks.exits: got 4, allowed \[1, 3\]"):
        make_exit_blocks(root, exits={4: 0})
    with pytest.raises(ConfigError, match=r"exit_blocks.exits: got 1, allowed none in a model of one block"):
        ExitBlockSettings({1: 1}).sources(1)
    with pytest.raises(ConfigError, match=r"exit_blocks.exits: got 3, allowed \[0, 2\].*exit 2"):
        make_exit_blocks(root, exits={2: 3})


def test_a_model_that_is_spread_over_devices_is_refused(root, tmp_path):
    module = make_exit_blocks(root)
    module.trainer = make_trainer(tmp_path, max_steps=1, callbacks=[])
    module._device_mesh = object()
    with pytest.raises(
        ConfigError, match=r"trainer.strategy: got .*, allowed one device or ddp with model.exit_blocks"
    ):
        module.configure_model()


def test_drafts_in_validation_go_through_the_exit_blocks(root):
    module = make_exit_blocks(root).eval()
    module.configure_model()
    decoder = module.exitable_decoder()
    assert [list(decoder.exit_span(layer)) for layer in (1, 2, 3)] == [[4], [], []]
    assert decoder.own_exits == (1, 2)
    assert module.bfloat16().exit_blocks["1"].decoder.rotary_emb.inv_freq.dtype == torch.float32
    assert [module.draft_size(layer).exit_blocks for layer in (1, 2, 3)] == [1, 0, 0]
    assert module.draft_size(1).head_blocks == pytest.approx(decoder.head_size / decoder.block_size)


def test_the_commands_train_and_measure_exit_blocks_and_refuse_what_does_not_go_with_them(
    root, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    corpus = {"code": {"kind": "files", "path": str(root / "corpus")}}
    data = {"sources": corpus, "seq_len": 24, "batch_size": 4, "validation_share": 0.2, "validation_rows": 8}
    monitor = {"class_path": "callbacks.ExitQualityMonitor"}  # by default of the exits that have blocks
    saver = {"class_path": "callbacks.LastCheckpoint", "init_args": {"every_n_train_steps": 2}}
    logger = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "runs", "name": "x", "version": ""}}
    trainer = {
        "max_steps": 2,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "accelerator": "cpu",
        "logger": logger,
        "callbacks": [monitor, saver],
    }
    settings = {
        "model": {"pretrained": str(root / "model.ckpt")},
        "data": {"class_path": "datamodules.TextCodeDataModule", "init_args": data},
        "trainer": trainer | {"enable_progress_bar": False, "enable_model_summary": False},
    }
    Path("x.yaml").write_text(yaml.safe_dump(settings))
    fit = ["fit", "--config", "x.yaml", "--config", str(CONFIGS / "variant/exit_block.yaml")]
    for arguments, message in (
        (["--layer_dropout.max_dropout_rate", "0.1"], "layer_dropout.max_dropout_rate: got 0.1, allowed 0 with"),
        (["--early_exit.curriculum=gradual"], "early_exit.curriculum: got 'gradual', allowed none with"),
        (["--trainer.strategy=MeshStrategy"], "trainer.strategy: got 'MeshStrategy', allowed one device or ddp with"),
        (["--model.exit_blocks.loss", "mse"], "model.exit_blocks.loss: got mse, allowed cross_entropy | kl | "),
        (["--model.exit_blocks.exits", "{3:1}"], "got a key without a value, allowed {KEY: VALUE}; write a blank"),
    ):
        assert cli(monkeypatch, *fit, *arguments) == 2
        assert message in capsys.readouterr().err
        assert not Path("runs").exists()
    assert cli(monkeypatch, *fit) == 0
    measured = [line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert measured == ["3", "4 (full)"]
    assert cli(monkeypatch, "validate", "--config", "runs/x/config.yaml", "--ckpt_path", "last") == 0
    capsys.readouterr()
    resume = ["fit", "--config", "runs/x/config.yaml", "--ckpt_path", "last"]
    assert cli(monkeypatch, *resume, "--model.exit_blocks", "null", "--allow_changes", "[model]") == 2
    assert "holds exit blocks {3: [3]}" in capsys.readouterr().err
