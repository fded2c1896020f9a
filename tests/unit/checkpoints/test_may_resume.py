"""The one place that answers whether a run may go on asks all who know a part of the answer."""

import copy
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn

from app.checkpoints import may_resume, resumed_config
from app.checkpoints.loop_counts import count_micro_batches
from app.checkpoints.may_resume import check_before, check_resume
from app.checkpoints.resumed_config import GivenConfig

PARTS = ("check_compatible", "refuse_weights_alone", "check_states", "check_optimizer_settings", "count_micro_batches")
CONFIG = {"trainer": {"accumulate_grad_batches": 2}}
SAVED = {"state_dict": {}, "loops": {"fit_loop": {}}, "Data": {}, "run_config": str(CONFIG)}


@pytest.fixture
def asked(monkeypatch):
    """Who was asked, in this order; nobody refuses."""
    names = []

    def asks(name):
        return lambda *args, **settings: names.append(name)

    for name in PARTS:
        monkeypatch.setattr(may_resume, name, asks(name))
    monkeypatch.setattr(resumed_config, "refuse_changes", asks("config"))
    return names


class Data:
    def __init__(self, asked):
        self._asked = asked

    def check_state_dict(self, state_dict):
        self._asked.append("data")


def going_on(asked, *, fn=TrainerFn.FITTING, given=None):
    trainer = SimpleNamespace(
        state=SimpleNamespace(fn=fn), datamodule=Data(asked), callbacks=[], ckpt_path=None, accumulate_grad_batches=2
    )
    return SimpleNamespace(trainer=trainer, config=None, given_config=given, exit_sources={}, peft=None)


PARTS_OF_FIT = ["check_compatible", "refuse_weights_alone", "check_states", "data"]


def test_the_command_line_asks_all_parts_and_the_config_of_a_run_once(asked, tmp_path):
    given = GivenConfig(CONFIG)
    torch.save(SAVED, tmp_path / "last.ckpt")
    check_before(tmp_path / "last.ckpt", given, fit=True)
    assert asked == ["config"]
    module = going_on(asked, given=given)
    check_resume(copy.deepcopy(SAVED), module)
    assert asked[1:] == [*PARTS_OF_FIT, "check_optimizer_settings", "count_micro_batches"]
    asked.clear()
    check_resume(SAVED | {"run_config": str(CONFIG | {"seed_everything": 1})}, module)  # another file than before
    assert asked == [*PARTS_OF_FIT, "config", "check_optimizer_settings", "count_micro_batches"]


def test_scripts_ask_all_but_the_config_and_other_verbs_what_they_take(asked):
    check_resume(SAVED, going_on(asked))
    assert asked == [*PARTS_OF_FIT, "check_optimizer_settings", "count_micro_batches"]
    asked.clear()
    check_resume(SAVED, going_on(asked, given=GivenConfig(CONFIG, ["model.optimizer"])))
    assert asked == [*PARTS_OF_FIT, "config", "count_micro_batches"]
    asked.clear()
    check_resume(dict(SAVED), going_on(asked, fn=TrainerFn.VALIDATING, given=GivenConfig(CONFIG)))
    assert asked == ["check_compatible", "check_states", "data"]


@pytest.mark.parametrize("saved", [2, None])
def test_micro_batches_are_counted_as_the_run_that_goes_on_counts_them(saved):
    def counts(ready):
        of_one = {"ready": ready, "started": ready, "processed": ready, "completed": ready - 1}
        return {"total": dict(of_one), "current": dict(of_one), "is_last_batch": False}

    steps = {"step": {"total": {"completed": 3}, "current": {"completed": 3}}}
    fit_loop = {
        "epoch_loop.batch_progress": counts(6),
        "epoch_loop.automatic_optimization.optim_progress": {"optimizer": steps},
    }
    for _ in range(2):  # a strategy may ask twice
        count_micro_batches(fit_loop, saved=saved, given=1)
        assert fit_loop["epoch_loop.batch_progress"] == counts(3)
