"""N steps, a checkpoint, and N more equal 2N steps: batches, masks, exits, losses, weights."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import EarlyExitCurriculum, ExitQualityMonitor, LastCheckpoint, LayerDropoutCurriculum
from tests.support.runs import Recorder, curricula, make_data, make_module, make_trainer

N = 5


def train(root, *, max_steps, ckpt_path=None, seed=0, workers=0, curriculum="rotational", accumulate=2):
    recorder = Recorder()
    saver = ModelCheckpoint(dirpath=root / "checkpoints", every_n_train_steps=N, save_top_k=-1)
    callbacks = [
        LayerDropoutCurriculum(max_dropout_rate=0.5, time_scale="exponential"),
        EarlyExitCurriculum(curriculum=curriculum, rotation_interval=3),
        recorder,
        saver,
    ]
    # The run's length is 2N in both parts: schedules are functions of it; the first part is stopped by the caller.
    trainer = make_trainer(root, max_steps=2 * N, callbacks=callbacks, accumulate_grad_batches=accumulate)
    if max_steps < 2 * N:
        trainer.callbacks.append(StopAfter(max_steps))
    module = make_module(seed=seed, lr_schedule="cosine", warmup_steps=2)
    data = make_data(root, num_workers=workers)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return recorder.steps, {name: p.detach().clone() for name, p in module.named_parameters()}


class StopAfter(Recorder):
    def __init__(self, steps):
        super().__init__()
        self.limit = steps

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= self.limit


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("curriculum", ["rotational", "gradual"])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, curriculum, workers):
    whole, weights = train(tmp_path / "whole", max_steps=2 * N, curriculum=curriculum, workers=workers)
    first, _ = train(tmp_path / "parts", max_steps=N, curriculum=curriculum, workers=workers)
    saved = next((tmp_path / "parts" / "checkpoints").glob(f"*step={N}.ckpt"))
    second, resumed = train(
        tmp_path / "parts", max_steps=2 * N, curriculum=curriculum, workers=workers, ckpt_path=str(saved)
    )
    assert first + second == whole
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    assert len({step["exits"] for step in whole}) > 1  # the comparison has something to miss
    assert any(any(step["dropped"]) for step in whole)
    assert any(a["rows"] != b["rows"] for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("stop", [4, 5, 7])  # at a multiple of every_n_train_steps, and not
def test_the_end_of_training_is_the_last_checkpoint_and_is_gone_on_from(tmp_path, stop):
    def part(name, *extra, ckpt_path=None):
        recorder = Recorder()
        saver = LastCheckpoint(dirpath=str(tmp_path / name), every_n_train_steps=4)
        callbacks = [*curricula(), recorder, ExitQualityMonitor(), saver, *extra]
        settings = {"val_check_interval": 1, "check_val_every_n_epoch": None, "limit_val_batches": 1.0}
        trainer = make_trainer(tmp_path, max_steps=2 * N, callbacks=callbacks, **settings)
        trainer.fit(make_module(), datamodule=make_data(tmp_path), ckpt_path=ckpt_path)
        (saved,) = (tmp_path / name).iterdir()
        assert saved.name == "last.ckpt"
        checkpoint = torch.load(saved, weights_only=True)
        assert checkpoint["global_step"] == trainer.global_step
        assert max(checkpoint["callbacks"]["ExitQualityMonitor"]["history"]) == trainer.global_step
        return recorder.steps

    whole = part("whole")
    assert part("parts", StopAfter(stop)) + part("parts", ckpt_path=str(tmp_path / "parts" / "last.ckpt")) == whole


def test_another_seed_is_another_run(tmp_path):
    """Negative control: the comparison above sees masks."""
    one, _ = train(tmp_path / "one", max_steps=2 * N)
    two, _ = train(tmp_path / "two", max_steps=2 * N, seed=1)
    assert [step["dropped"] for step in one] != [step["dropped"] for step in two]


def test_exits_and_rates_are_constant_within_an_accumulated_step(tmp_path):
    steps, _ = train(tmp_path, max_steps=2 * N, accumulate=2)
    assert len(steps) == 4 * N
    for first, second in zip(steps[::2], steps[1::2], strict=True):
        assert first["exits"] == second["exits"]
    assert len({step["dropped"] for step in steps}) > N  # but the masks of the micro-batches differ


def test_accumulated_step_equals_one_large_batch(tmp_path):
    """Losses are divided by the label tokens of the whole step, not micro-batch by micro-batch."""
    weights = []
    for name, batch_size, accumulate in (("large", 8, 1), ("accumulated", 4, 2)):
        # SGD, since Adam's first steps are signs: they would blow rounding up
        module = make_module(optimizer=lambda params: torch.optim.SGD(params, lr=0.5))
        trainer = make_trainer(
            tmp_path / name, max_steps=4, callbacks=curricula(max_dropout_rate=0.0), accumulate_grad_batches=accumulate
        )
        trainer.fit(module, datamodule=make_data(tmp_path, batch_size=batch_size))
        weights.append(dict(module.named_parameters()))
    for name in weights[0]:
        assert torch.allclose(weights[0][name], weights[1][name], atol=1e-6), name
