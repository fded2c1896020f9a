"""N steps, a checkpoint, and N more equal 2N steps: batches, masks, exits, losses, weights."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from app.checkpoints.checkpoint_io import AtomicCheckpointIO
from app.errors import ConfigError
from app.training.strategy import MeshStrategy
from callbacks import EarlyExitCurriculum, ExitQualityMonitor, LastCheckpoint, LayerDropoutCurriculum
from tests.support.runs import Recorder, curricula, make_data, make_module, make_trainer

N = 5


def train(root, *, max_steps, ckpt_path=None, seed=0, workers=0, curriculum="rotational", accumulate=2, **schedule):
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
    module = make_module(seed=seed, **(schedule or {"lr_schedule": "cosine", "warmup_steps": 2}))
    data = make_data(root, num_workers=workers)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return recorder.steps, {name: p.detach().clone() for name, p in module.named_parameters()}


class StopAfter(Recorder):
    def __init__(self, steps):
        super().__init__()
        self.limit = steps

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= self.limit


def one_cycle(optimizer):  # which moves AdamW's betas, too
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=2 * N)


def every_fifth(optimizer):  # whose state counts no steps
    return torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=N - 1)


@pytest.mark.parametrize(
    "how",
    [
        {"curriculum": "rotational", "workers": 0, "lr_scheduler": one_cycle},
        {"curriculum": "rotational", "workers": 2},
        {"curriculum": "gradual", "workers": 0, "lr_scheduler": every_fifth},
    ],
    ids=lambda how: "-".join(getattr(value, "__name__", str(value)) for value in how.values()),
)
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, how):
    whole, weights = train(tmp_path / "whole", max_steps=2 * N, **how)
    first, _ = train(tmp_path / "parts", max_steps=N, **how)
    saved = next((tmp_path / "parts" / "checkpoints").glob(f"*step={N}.ckpt"))
    second, resumed = train(tmp_path / "parts", max_steps=2 * N, ckpt_path=str(saved), **how)
    assert first + second == whole
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    assert len({step["exits"] for step in whole}) > 1  # the comparison has something to miss
    assert any(any(step["dropped"]) for step in whole)
    assert any(a["rows"] != b["rows"] for a, b in zip(first, second, strict=True))


class SaveAt(Callback):
    """Saves at given hooks of given micro-batches, as a user's own callback may."""

    def __init__(self, folder, moments):
        self.folder, self.moments = folder, moments

    def setup(self, trainer, pl_module, stage):
        for hook in {hook for _, hook in self.moments}:
            setattr(self, hook, lambda trainer, *_, hook=hook: self.save(trainer, hook))

    def save(self, trainer, hook):
        moment = trainer.fit_loop.epoch_loop.total_batch_idx, hook
        if moment in self.moments:
            trainer.save_checkpoint(self.folder / f"{moment[0]}-{hook}.ckpt", weights_only=False)


class Validations(Callback):
    def __init__(self):
        self.losses = {}

    def on_validation_end(self, trainer, pl_module):
        self.losses[trainer.fit_loop.epoch_loop.total_batch_idx] = trainer.callback_metrics["val/loss"].item()


# (micro-batch, hook): of the second step's three, 3, 4 and 5, with a validation behind 3; and of what surrounds them.
MOMENTS = {
    (2, "on_before_optimizer_step"): 0,
    (2, "on_train_batch_end"): 3,
    (3, "on_train_batch_start"): 3,
    (3, "on_after_backward"): 3,
    (3, "on_train_batch_end"): 3,
    (3, "on_validation_batch_start"): 3,
    (3, "on_validation_end"): 3,
    (4, "on_train_batch_end"): 3,
    (5, "on_train_batch_end"): 6,
    (11, "on_train_batch_end"): 12,  # a validation behind a step is to come
    (11, "on_validation_batch_end"): 12,
    (11, "on_validation_end"): 12,
}


def test_a_checkpoint_written_at_any_moment_resumes_behind_the_latest_step(tmp_path):
    def part(*extra, ckpt_path=None):
        recorder, validations = Recorder(), Validations()
        callbacks = [*curricula(), recorder, validations, *extra]
        settings = {"val_check_interval": 4, "check_val_every_n_epoch": None, "limit_val_batches": 1.0}
        trainer = make_trainer(tmp_path, max_steps=N, callbacks=callbacks, accumulate_grad_batches=3, **settings)
        module = make_module(lr_schedule="cosine", warmup_steps=2)
        trainer.fit(module, datamodule=make_data(tmp_path), ckpt_path=ckpt_path)
        return recorder.steps, validations.losses, [p.detach().clone() for p in module.parameters()]

    steps, losses, weights = part(SaveAt(tmp_path, MOMENTS))
    assert list(losses) == [3, 7, 11]
    for (micro_batch, hook), first in MOMENTS.items():
        moment = f"{micro_batch}-{hook}"
        again, validated, resumed = part(ckpt_path=str(tmp_path / f"{moment}.ckpt"))
        assert again == steps[first:], moment
        over = {at for at in losses if at < first - (hook != "on_validation_end")}
        assert validated == {at: loss for at, loss in losses.items() if at not in over}, moment
        assert all(map(torch.equal, resumed, weights)), moment


def test_a_script_that_cannot_keep_the_checkpoint_before_is_told_so(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=N, callbacks=[LastCheckpoint(keep_previous=True)], plugins=[])
    with pytest.raises(ConfigError, match=r"keep_previous: got True, .*AtomicCheckpointIO\(\)\]\) keeps it"):
        trainer.fit(make_module(), datamodule=make_data(tmp_path))
    sharded = make_trainer(tmp_path, max_steps=N, callbacks=[], plugins=[], strategy=MeshStrategy())
    assert isinstance(sharded.strategy.checkpoint_io, AtomicCheckpointIO)


def test_a_resumed_run_leaves_what_it_came_from_and_the_one_before(tmp_path):
    def part(ckpt_path=None, stop=()):
        saver = LastCheckpoint(dirpath=str(tmp_path / "kept"), every_n_train_steps=2, keep_previous=True)
        trainer = make_trainer(tmp_path, max_steps=N, callbacks=[*curricula(), saver], accumulate_grad_batches=2)
        trainer.callbacks[:0] = stop
        trainer.fit(make_module(), datamodule=make_data(tmp_path), ckpt_path=ckpt_path)

    class Interrupt(Callback):
        def __init__(self, micro_batch):
            self.micro_batch = micro_batch

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == self.micro_batch:
                raise RuntimeError("killed")

    for ckpt_path, micro_batch in ((None, 9), (str(tmp_path / "kept" / "last.ckpt"), 9)):
        with pytest.raises(RuntimeError, match="killed"):
            part(ckpt_path, stop=[Interrupt(micro_batch)])
        saved = {path.name: torch.load(path, weights_only=True) for path in (tmp_path / "kept").iterdir()}
        assert {name: checkpoint["global_step"] for name, checkpoint in saved.items()} == {
            "last.ckpt": 4,
            "before_last.ckpt": 2,
        }


@pytest.mark.parametrize("stop", [4, 5])  # at a multiple of every_n_train_steps, and not
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
        assert (first["exits"], first["dropped"]) == (second["exits"], second["dropped"])
    assert len({step["dropped"] for step in steps}) > 2


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
