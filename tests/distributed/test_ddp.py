"""Two DDP processes equal one process with the same global batch, also when a whole block is dropped."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from app.model.lora import LoraSettings
from app.model_files.open import load_pretrained
from app.training.exit_block_settings import ExitBlockSettings
from app.training.module import LayerSkipModule
from callbacks import ExitQualityMonitor
from tests.support.processes import run_ranks
from tests.support.runs import Recorder, curricula, make_data, make_module, make_trainer
from tests.support.saved_models import save_model

BATCH, STEPS = 4, 6
RATE = 0.9  # of four samples the last block often keeps none


def train(root, *, ranks, batch_size, accumulate=1, ckpt_path=None, steps=STEPS, workers=0):
    recorder = Recorder()
    saver = ModelCheckpoint(dirpath=root / "ckpt", every_n_train_steps=3, save_top_k=-1)
    trainer = make_trainer(
        root,
        max_steps=steps,
        callbacks=[*curricula(max_dropout_rate=RATE), recorder, ExitQualityMonitor(), saver],
        devices=ranks,
        accumulate_grad_batches=accumulate,
        strategy=DDPStrategy(process_group_backend="gloo") if ranks > 1 else "auto",
        limit_val_batches=1.0,
        check_val_every_n_epoch=None,
        val_check_interval=STEPS * accumulate,
    )
    # SGD, since Adam's first steps are signs: they would blow rounding up
    module = make_module(optimizer=lambda params: torch.optim.SGD(params, lr=0.3))
    data = make_data(root, batch_size=batch_size, num_lanes=2 * max(1, workers), num_workers=workers)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    weights = {name: p.detach().numpy() for name, p in module.named_parameters()}
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    return {"steps": recorder.steps, "weights": weights, "metrics": metrics}


@pytest.mark.distributed
def test_two_ranks_equal_one_process_with_the_same_global_batch(tmp_path):
    make_data(tmp_path).prepare_data()
    first, second = run_ranks(_train_ddp, tmp_path, 2)
    single = train(tmp_path, ranks=1, batch_size=BATCH, accumulate=4)
    for name, expected in single["weights"].items():
        assert abs(first["weights"][name] - expected).max() < 1e-6, name
        assert (first["weights"][name] == second["weights"][name]).all(), name
    for name, expected in single["metrics"].items():
        if "loss" in name:
            assert first["metrics"][name] == pytest.approx(expected, abs=1e-5), name
    for ours, theirs, (one, two) in zip(first["steps"], second["steps"], batched(single["steps"]), strict=True):
        assert (ours["rows"], theirs["rows"]) == (one["rows"], two["rows"])
        assert ours["dropped"] == theirs["dropped"] == one["dropped"] == two["dropped"]
    assert any(1.0 in step["dropped"] for step in first["steps"])  # a block that nobody went through


EXIT_BLOCKS = {"exit_blocks": ExitBlockSettings({1: 1, 2: 0})}
LORA = {"peft": LoraSettings(4)}


def train_frozen(root, settings, *, ranks, accumulate):
    trainer = make_trainer(
        root,
        max_steps=STEPS,
        callbacks=curricula(max_dropout_rate=RATE) if settings == LORA else [],
        devices=ranks,
        accumulate_grad_batches=accumulate,
        strategy=DDPStrategy(process_group_backend="gloo") if ranks > 1 else "auto",
    )
    module = LayerSkipModule(
        pretrained=str(root / "model"),
        optimizer=lambda params: torch.optim.SGD(params, lr=3.0),
        lr_schedule="constant",
        **settings,
    )
    trainer.fit(module, datamodule=make_data(root, batch_size=BATCH, num_lanes=2))
    return {name: p.detach().numpy() for name, p in module.named_parameters()}


def _train_frozen(root, settings):
    return train_frozen(root, settings, ranks=2, accumulate=1)


@pytest.mark.distributed
@pytest.mark.parametrize("settings", [EXIT_BLOCKS, LORA], ids=lambda settings: next(iter(settings)))
def test_a_frozen_model_s_parts_learn_on_two_ranks_what_they_learn_on_one(tmp_path, settings):
    data = make_data(tmp_path)
    data.prepare_data()
    start = load_pretrained(str(save_model(tmp_path / "model", tokenizer=data.tokenizer)))
    first, second = run_ranks(_train_frozen, tmp_path, settings)
    for name, expected in train_frozen(tmp_path, settings, ranks=1, accumulate=2).items():
        assert abs(first[name] - expected).max() < 1e-5, name
        assert (first[name] == second[name]).all(), name
    for name, weight in start.named_parameters():
        owner, _, kind = name.rpartition(".")
        frozen = first.get(f"model.{owner}.base_layer.{kind}", first.get(f"model.{name}"))
        assert (frozen == weight.detach().numpy()).all(), name
    if settings == LORA:
        assert all(abs(first[name]).max() > 1e-4 for name in first if ".lora_B." in name)  # they begin as 0
        return
    for name, weight in start.model.layers[1].named_parameters():
        assert abs(first[f"exit_blocks.1.decoder.layers.0.{name}"] - weight.detach().numpy()).max() > 1e-4, name


def batched(items):
    return zip(items[::2], items[1::2], strict=True)


def _train_ddp(root, accumulate, workers=0):
    return train(root, ranks=2, batch_size=BATCH, accumulate=accumulate, workers=workers)


@pytest.mark.distributed
def test_two_ranks_resume_to_the_same_run(tmp_path):
    make_data(tmp_path).prepare_data()
    whole = run_ranks(_train_ddp, tmp_path, 1, 2)
    resumed = run_ranks(_resume_ddp, tmp_path, 2)
    for before, after in zip(whole, resumed, strict=True):
        assert after["steps"] == before["steps"][3:]
        assert all((before["weights"][name] == after["weights"][name]).all() for name in before["weights"])
    assert whole[0]["steps"][0]["rows"] != whole[1]["steps"][0]["rows"]  # the ranks' data differ


def _resume_ddp(root, workers):
    saved = next((root / "ckpt").glob("*step=3.ckpt"))
    return train(root, ranks=2, batch_size=BATCH, ckpt_path=str(saved), workers=workers)
