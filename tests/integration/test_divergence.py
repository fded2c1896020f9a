"""Losses and gradients that are not finite: they never reach the weights, and the message says where they were."""

import copy
import itertools
import logging

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from app.errors import ConfigError, DivergenceError
from app.model_files.open import build_model
from tests.support.runs import curricula, make_data, make_module, make_trainer


class PoisonWeightsAt(Callback):
    """Makes one block's weights NaN before some micro-batch of a step, and as they were behind it."""

    def __init__(self, *steps, micro_batch=0, restore=False):
        self.steps, self.micro_batch, self.restore = steps, micro_batch, restore

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        weight = pl_module.model.model.layers[2].mlp.up_proj.weight
        at = trainer.global_step, batch_idx % trainer.accumulate_grad_batches
        self.saved = None
        if at in {(step, self.micro_batch) for step in self.steps}:
            self.saved = weight.detach().clone()
            with torch.no_grad():
                weight.fill_(float("nan"))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.restore and self.saved is not None:
            with torch.no_grad():
                pl_module.model.model.layers[2].mlp.up_proj.weight.copy_(self.saved)


class PoisonGradientAt(Callback):
    """Makes one gradient infinite after the backward of a step; the loss stays finite."""

    def __init__(self, *steps):
        self.steps = steps

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step in self.steps:
            pl_module.model.lm_head.weight.grad.fill_(float("inf"))


class Watch(Callback):
    """Weights, optimizer states and learning rate behind each step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        weights = [parameter.detach().clone() for parameter in pl_module.parameters()]
        states = copy.deepcopy(trainer.optimizers[0].state_dict()["state"])
        rate = trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0]
        skipped = trainer.callback_metrics.get("train/skipped_steps")
        self.steps.append((trainer.global_step, weights, states, rate, skipped and skipped.item()))


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# -- stop ------------------------------------------------------------------------------------------------------------


def test_nan_loss_stops_naming_step_and_exit_and_keeps_the_last_checkpoint(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path / "ckpt", every_n_train_steps=2, save_top_k=-1)
    module = make_module()
    callbacks = [*curricula(max_dropout_rate=0.0), PoisonWeightsAt(5), saver]
    trainer = make_trainer(tmp_path, max_steps=10, callbacks=callbacks)
    with pytest.raises(DivergenceError, match=r"loss at exit 3 is nan at step 5 with exits \[3, 4\] on, rank 0 micro"):
        trainer.fit(module, datamodule=make_data(tmp_path))
    saved = sorted((tmp_path / "ckpt").glob("*.ckpt"))
    assert [path.stem.split("step=")[1] for path in saved] == ["2", "4"]
    weights = torch.load(saved[-1], weights_only=True)["state_dict"]
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_the_message_names_the_micro_batch(tmp_path):
    callbacks = [*curricula(max_dropout_rate=0.0), PoisonWeightsAt(1, micro_batch=2)]
    trainer = make_trainer(tmp_path, max_steps=3, callbacks=callbacks, accumulate_grad_batches=3)
    with pytest.raises(DivergenceError, match=r"at step 1 with exits .* on, rank 0 micro-batch 2;"):
        trainer.fit(make_module(), datamodule=make_data(tmp_path))


def test_infinite_gradient_stops_before_it_reaches_the_weights(tmp_path):
    module = make_module()
    saver = ModelCheckpoint(dirpath=tmp_path / "ckpt", every_n_train_steps=1, save_top_k=-1)
    trainer = make_trainer(
        tmp_path, max_steps=6, callbacks=[*curricula(), PoisonGradientAt(3), saver], gradient_clip_val=1.0
    )
    message = r"gradient norm is inf at step 3 with exits \[.*\] on, in model\.model\.embed_tokens\.weight on rank 0;"
    with pytest.raises(DivergenceError, match=message):  # tied to the head
        trainer.fit(module, datamodule=make_data(tmp_path))
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    assert len(list((tmp_path / "ckpt").glob("*.ckpt"))) == 3


class PoisonUpdateAt(PoisonWeightsAt):
    """Makes weights NaN behind a step, as an optimizer may."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pass


def saver_in(folder):
    return ModelCheckpoint(dirpath=folder, every_n_train_steps=2, save_top_k=-1)


@pytest.mark.parametrize(
    ("poison", "saves", "advice"),
    [
        (
            PoisonGradientAt(3),
            True,
            r"the last checkpoint has finite weights: resume it with a lower .* --allow_changes .*, or skip",
        ),
        (PoisonGradientAt(3), False, "no checkpoint was saved yet: start anew with a lower learning rate, or skip"),
        (PoisonGradientAt(1), True, "no checkpoint was saved yet: start anew"),
        (PoisonGradientAt(0), True, "it is the first one, whatever the learning rate: look at its data"),
        (
            PoisonWeightsAt(0),
            True,
            "the weights that it began with are not finite in .*up_proj.* rank 0: start from",
        ),
        (PoisonUpdateAt(3), True, "a step before left weights that are not finite in .*: resume an earlier checkpoint"),
    ],
)
def test_the_advice_is_true_of_the_weights_and_of_what_was_saved(tmp_path, poison, saves, advice):
    callbacks = [*curricula(max_dropout_rate=0.0), poison, *([saver_in(tmp_path / "ckpt")] if saves else [])]
    with pytest.raises(DivergenceError, match=f"the step was not taken: {advice}"):
        make_trainer(tmp_path, max_steps=6, callbacks=callbacks).fit(make_module(), datamodule=make_data(tmp_path))


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(
    ("step", "advice"),
    [
        (2, "it is the first one after the checkpoint, whatever the learning rate: resume an earlier checkpoint"),
        (3, "the last checkpoint has finite weights"),
    ],
)
def test_a_resumed_run_that_fails_at_once_is_not_sent_back_to_its_checkpoint(tmp_path, step, advice):
    def fit(*callbacks, max_steps, ckpt_path=None):
        callbacks = [*curricula(), saver_in(tmp_path / "ckpt"), *callbacks]
        trainer = make_trainer(tmp_path, max_steps=max_steps, callbacks=callbacks)
        trainer.fit(make_module(), datamodule=make_data(tmp_path), ckpt_path=ckpt_path)

    fit(max_steps=2)
    (saved,) = (tmp_path / "ckpt").iterdir()
    with pytest.raises(DivergenceError, match=f"the step was not taken: {advice}"):
        fit(PoisonGradientAt(step), max_steps=5, ckpt_path=saved)


# -- skip ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("poison", [PoisonGradientAt(2), PoisonWeightsAt(2, restore=True)])
def test_a_skipped_step_changes_no_weight_and_no_state_and_still_counts_as_a_step(tmp_path, poison, clip):
    watch, module = Watch(), make_module(on_divergence="skip", warmup_steps=8)
    callbacks = [*curricula(max_dropout_rate=0.0), poison, watch]
    make_trainer(tmp_path, max_steps=5, callbacks=callbacks, gradient_clip_val=clip).fit(
        module, datamodule=make_data(tmp_path)
    )
    (_, before, states, *_), (step, after, states_after, _, skipped) = watch.steps[1:3]
    assert (step, skipped) == (3, 1.0)
    assert same(before, after)
    assert all(same(states[key].values(), states_after[key].values()) for key in states)
    assert [entry[-1] for entry in watch.steps] == [0.0, 0.0, 1.0, 1.0, 1.0]
    rates = [rate for *_, rate, _ in watch.steps]
    assert all(later > earlier for earlier, later in itertools.pairwise(rates))  # the schedule goes on
    assert not same(after, watch.steps[3][1])  # and so does training
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


def test_a_skipped_step_has_no_losses_in_tensorboard(tmp_path):
    trainer = make_trainer(
        tmp_path,
        max_steps=4,
        callbacks=[*curricula(), PoisonGradientAt(2)],
        log_every_n_steps=1,
        logger=TensorBoardLogger(tmp_path, name="run", version=""),
    )
    trainer.fit(make_module(on_divergence="skip"), datamodule=make_data(tmp_path))
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    for tag in ("train/loss", "train/label_tokens_per_step", "train/exit_loss/exit_04"):
        assert [event.step for event in events.Scalars(tag)] == [0, 1, 3]
    assert [event.value for event in events.Scalars("train/skipped_steps")] == [0.0, 0.0, 1.0, 1.0]


def test_the_first_step_can_be_skipped_too(tmp_path):
    watch, module = Watch(), make_module(on_divergence="skip")
    callbacks = [*curricula(), PoisonGradientAt(0), watch]
    make_trainer(tmp_path, max_steps=2, callbacks=callbacks).fit(module, datamodule=make_data(tmp_path))
    assert [entry[-1] for entry in watch.steps] == [1.0, 1.0]
    assert len(watch.steps[0][2]) == 0  # the optimizer has no state yet


def test_no_more_steps_are_skipped_than_allowed_and_a_resumed_run_goes_on_counting(tmp_path, caplog):
    def fit(max_steps, steps, ckpt_path=None):
        saver = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True, every_n_train_steps=1, save_top_k=0)
        module = make_module(on_divergence="skip", max_skipped_steps=2)
        callbacks = [*curricula(), PoisonGradientAt(*steps), saver]
        trainer = make_trainer(tmp_path, max_steps=max_steps, callbacks=callbacks)
        trainer.fit(module, datamodule=make_data(tmp_path), ckpt_path=ckpt_path)

    logger = logging.getLogger("app")
    logger.addHandler(caplog.handler)
    try:
        fit(3, (1, 2))
    finally:
        logger.removeHandler(caplog.handler)
    assert "gradient norm is inf at step 2" in caplog.text
    assert "skipped, 2 of 2" in caplog.text
    with pytest.raises(DivergenceError, match=r"at step 4 .*2 steps of this run were skipped before"):
        fit(6, (4,), tmp_path / "ckpt" / "last.ckpt")


@pytest.mark.parametrize("settings", [{"on_divergence": "pray"}, {"max_skipped_steps": 0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        make_module(**settings)


# -- fp16: the scaler skips what overflows because it is scaled -------------------------------------------------------


def fit_in_half_precision(root, *callbacks, init_scale, max_steps=6, fused=False, clip=None, **settings):
    """Precision 16-mixed, which Lightning gives on GPUs alone."""
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    watch = Watch()
    adamw = {"optimizer": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=fused)}
    module = make_module(**(adamw | settings))
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    callbacks = [*curricula(), watch, *callbacks]
    trainer = make_trainer(root, max_steps=max_steps, callbacks=callbacks, gradient_clip_val=clip)
    trainer.strategy.precision_plugin = plugin
    trainer.fit(module, datamodule=make_data(root))
    return module, watch.steps, scaler.get_scale()


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # the scaler skips the first step
@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_of_scaled_gradients_is_left_to_the_scaler(tmp_path, fused):
    module, steps, scale = fit_in_half_precision(tmp_path, init_scale=2.0**32, max_steps=14, fused=fused)
    assert scale < 2.0**32  # something overflowed
    assert same(steps[0][1], steps[1][1])
    assert not same(steps[0][1], steps[-1][1])
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


class CountLabels(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.labels = int((batch["labels"] != -100).sum())


def test_a_scaled_step_is_the_mean_over_its_label_tokens_and_clipped_to_its_norm(tmp_path):
    norms = {}
    for clip in (None, 0.25):
        count = CountLabels()
        optimizer = {"optimizer": lambda params: torch.optim.SGD(params, lr=1.0)}
        module, steps, _ = fit_in_half_precision(tmp_path, count, init_scale=64.0, max_steps=1, clip=clip, **optimizer)
        before = build_model(module.config, seed=0).parameters()
        moves = [(after - start).detach() for after, start in zip(steps[0][1], before, strict=True)]
        norms[clip] = float(torch.linalg.vector_norm(torch.cat([move.flatten() for move in moves])))
        assert module.trainer.callback_metrics["train/label_tokens_per_step"] == count.labels > 0
    assert norms[0.25] == pytest.approx(0.25, rel=1e-2)
    assert 0.5 < norms[None] < 50  # not 64 times as far


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # the scaler skips the first step
def test_an_infinite_gradient_that_is_not_scaled_any_more_is_divergence(tmp_path):
    with pytest.raises(DivergenceError, match="gradient norm is inf at step 2"):
        fit_in_half_precision(tmp_path, PoisonGradientAt(*range(9)), init_scale=4.0)


@pytest.mark.parametrize("fused", [False, True])
def test_a_nan_loss_is_divergence_under_the_scaler_too(tmp_path, fused):
    poison = PoisonWeightsAt(2, restore=True)
    with pytest.raises(DivergenceError, match="loss at exit"):
        fit_in_half_precision(tmp_path, poison, init_scale=64.0, fused=fused)
    module, steps, _ = fit_in_half_precision(
        tmp_path, PoisonWeightsAt(2, restore=True), init_scale=64.0, fused=fused, on_divergence="skip"
    )
    assert same(steps[1][1], steps[2][1])
    assert not same(steps[2][1], steps[3][1])
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
