"""Callbacks of a user's own that set exits or dropout: obeyed, or refused by name."""

import re

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback

from app.errors import ConfigError
from callbacks import EarlyExitCurriculum, ExitQualityMonitor, LayerDropoutCurriculum
from tests.support.runs import Recorder, curricula, make_data, make_module, make_trainer

HALVES = {2: 0.5, 4: 0.5}


class Own(Callback):
    """Calls `action(module)` in the hook of that name, with the number of the micro-batch if there is one."""

    def __init__(self, action, hook="on_train_batch_start"):
        self.action = action
        setattr(self, hook, self.act)

    def act(self, trainer, pl_module, *rest, stage=None):
        self.action(pl_module, *rest[1:])


class Other(Own):
    pass


def fit(tmp_path, *callbacks, module=None, **settings):
    module, recorder = module or make_module(), Recorder()
    trainer = make_trainer(tmp_path, callbacks=[*callbacks, recorder], **({"max_steps": 2} | settings))
    trainer.fit(module, datamodule=make_data(tmp_path))
    return [dict(step["exits"]) for step in recorder.steps], module, trainer.callback_metrics


def halves(module, *_):
    module.set_exit_weights(HALVES)


@pytest.mark.parametrize(
    ("hook", "behind"), [("on_train_batch_start", False), ("on_train_batch_start", True), ("setup", False)]
)
def test_an_own_curriculum_is_used_and_logged_beside_the_groups_that_are_off(tmp_path, hook, behind):
    groups = curricula(curriculum="none", max_dropout_rate=0.0)
    own = [Own(lambda module, *_: (halves(module), module.set_dropout_rates([0, 0, 0, 0.25])), hook)]
    used, module, logged = fit(tmp_path, *(groups + own if behind else own + groups))
    assert used == [HALVES, HALVES]
    assert module.dropout_rates == (0, 0, 0, 0.25)
    assert (logged["train/exit_weight/exit_02"], logged["train/dropout_rate/last_layer"]) == (0.5, 0.25)


RATES = [0.0, 0.1, 0.1, 0.1]
CONFLICTS = {
    "Own and EarlyExitCurriculum": [Own(halves), EarlyExitCurriculum(curriculum="rotational", rotation_interval=3)],
    "LayerDropoutCurriculum and Own": [
        LayerDropoutCurriculum(max_dropout_rate=0.1), Own(lambda module, *_: module.set_dropout_rates(RATES))
    ],
    "LayerDropoutCurriculum and LayerDropoutCurriculum": [
        LayerDropoutCurriculum(max_dropout_rate=0.1), LayerDropoutCurriculum(max_dropout_rate=0.2)
    ],
    "Other and Own": [Own(halves), Other(halves, "on_train_start")],
    "<lambda> (": [
        LambdaCallback(on_train_batch_start=lambda trainer, module, *_: module.set_exit_weights({4: 1.0})),
        LambdaCallback(on_train_batch_start=lambda trainer, module, *_: module.set_exit_weights(HALVES)),
    ],
}  # fmt: skip


@pytest.mark.parametrize("names", CONFLICTS)
def test_two_that_set_the_same_are_refused_by_name(tmp_path, names):
    with pytest.raises(ConfigError, match=rf"trainer\.callbacks: got '.*{re.escape(names)}.*, allowed one that sets"):
        fit(tmp_path, *CONFLICTS[names])


def test_exits_set_before_the_fit_hold_for_it_and_conflict_with_a_curriculum(tmp_path):
    module = make_module()
    module.set_exit_weights(HALVES)
    assert fit(tmp_path, module=module)[0] == [HALVES, HALVES]
    module.set_exit_weights(HALVES)
    with pytest.raises(ConfigError, match=r"test_exits_set_before.* and EarlyExitCurriculum"):
        fit(tmp_path, *curricula(), module=module)


def test_what_a_callback_has_set_is_gone_with_its_fit(tmp_path):
    module = fit(tmp_path, *curricula(), Own(lambda *_: None))[1]
    assert fit(tmp_path, *curricula(curriculum="none", max_dropout_rate=0.0), module=module)[0] == [{4: 1.0}] * 2
    assert module.dropout_rates == (0.0,) * 4
    stops = Own(lambda *_: 1 / 0)  # an earlier fit that died between a curriculum and its forward
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, *curricula(), stops, module=module)
    assert len(fit(tmp_path, *curricula(), module=module)[0]) == 2


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda module, *_: module.set_exit_weights({2: 0.5, 4: 0.6}), r"sum to 1, not 1\.1"),
        (lambda module, *_: module.set_exit_weights({2: -0.5, 4: 1.5}), r"got -0\.5, allowed \[0, inf\)"),
        (lambda module, *_: module.set_exit_weights({5: 1.0}), r"got 5, allowed \[1, 4\]; exits count blocks run"),
        (lambda module, *_: module.set_dropout_rates([0.1] * 5), "got '5 rates', allowed 4, one a block"),
        (lambda module, *_: module.set_dropout_rates([0, 0, 0, 1.0]), r"got 1\.0, allowed \[0, 1\)"),
        (lambda module, idx: module.set_exit_weights({1 + idx: 0.5, 4: 0.5}), "the same in all micro-batches"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_used_are_refused_by_name(tmp_path, action, message):
    with pytest.raises(ConfigError, match=message):
        fit(tmp_path, Own(action), accumulate_grad_batches=2)


def test_two_monitors_both_get_their_exits(tmp_path):
    class Seen(Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, *_):
            self.exits = set(outputs["hidden_by_exit"])

    seen = Seen()
    monitors = [
        ExitQualityMonitor(exit_layers=[1, 4]),
        Own(lambda module, *_: module.monitor_exits([3]), "setup"),
        seen,
    ]
    logged = fit(tmp_path, *monitors, limit_val_batches=1, val_check_interval=1)[2]
    assert seen.exits == {1, 3, 4}
    assert "val/exit_loss/exit_01" in logged
