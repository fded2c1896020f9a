"""Every entry of a checkpoint that a run goes on from, edited in every way: refused before the first step."""

import contextlib
import copy

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from app.checkpoints.states import check_optimizer_settings, check_states
from app.errors import CheckpointError
from callbacks import ExitQualityMonitor, LastCheckpoint, ParseValidation
from tests.support.runs import curricula, make_data, make_module, make_trainer

READ = (
    "global_step",
    "epoch",
    "state_dict",
    "loops",
    "optimizer_states",
    "lr_schedulers",
    "callbacks",
    "skipped_steps",
)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A checkpoint of two epochs with validation, and a module and trainer that went on from it."""
    folder = tmp_path_factory.mktemp("resumed")
    settings = {"limit_train_batches": 2, "limit_val_batches": 1}

    def fit(max_steps, resume=None):
        best = ModelCheckpoint(dirpath=folder, filename="best", monitor="val/loss", save_top_k=2)
        savers = [LastCheckpoint(dirpath=str(folder), every_n_train_steps=3), best]
        trainer = make_trainer(folder, max_steps=max_steps, callbacks=[*curricula(), *savers], **settings)
        module = make_module()
        trainer.fit(module, datamodule=make_data(folder), ckpt_path=resume)
        return module

    fit(3)
    content = torch.load(folder / "last.ckpt", weights_only=True)
    return content, fit(5, folder / "last.ckpt")


def check(content, module):
    check_states(content, module)
    check_optimizer_settings(content, module)


def test_what_a_run_wrote_itself_is_taken(resumed):
    check(*resumed)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_optimizer_state_that_is_not_finite_is_refused_before_it_reaches_the_weights(resumed, value):
    content, module = copy.deepcopy(resumed[0]), resumed[1]
    content["optimizer_states"][0]["state"][2]["exp_avg"].view(-1)[-1] = value
    with pytest.raises(CheckpointError, match=r"state\.2\.exp_avg: got 'NaN or infinity', allowed finite numbers"):
        check(content, module)


class Strict(Callback):
    def load_state_dict(self, state_dict):
        self.needed = state_dict["needed"]


SCORES = {"history": {3: {1: (2.5, 0.5)}}}


@pytest.mark.parametrize(
    ("callback", "junk"),
    [
        *((ExitQualityMonitor(), {"history": junk}) for junk in (None, "x", {"x": {}}, {3: "x"}, {3: {0: (2.5, 0.5)}})),
        *((ExitQualityMonitor(), {"history": {3: {1: junk}}}) for junk in (2.5, (2.5,), (2.5, "x"))),
        *((ParseValidation(exit_layers=[1]), junk) for junk in ({}, {"validations": -1}, {"validations": "x"})),
        (Strict(), {"other": 1}),
    ],
)  # fmt: skip
def test_junk_in_the_state_of_a_callback_is_refused_by_name(resumed, callback, junk, monkeypatch):
    content, module = resumed
    name = callback.state_key
    monkeypatch.setattr(module.trainer, "callbacks", [*module.trainer.callbacks, callback])
    for state in (SCORES, {"validations": 2}, {"needed": 1}):
        with contextlib.suppress(CheckpointError):
            check(with_edit(content, ("callbacks", name), state), module)
            break
    else:
        pytest.fail("nothing is taken")
    with pytest.raises(CheckpointError, match=rf"callbacks\.{name}.*: got .*, allowed "):
        check(with_edit(content, ("callbacks", name), junk), module)


def entries(node, path=()):
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield (*path, key), value
        if isinstance(value, dict | list | tuple):
            yield from entries(value, (*path, key))


def edits(value):
    """What may stand in the place of a value, by name."""
    match value:
        case torch.Tensor():
            yield from {"zeros(3)": torch.zeros(3), "empty": value.new_zeros(0), "a number": 5}.items()
            yield from {"int64": value.to(torch.int64), "complex": value.to(torch.complex64)}.items()
            if value.dim():
                yield from {"bf16": value.to(torch.bfloat16), "one dim more": value[None]}.items()
        case bool():
            yield "junk", "x"
        case int():
            yield from {"negative": -5, "huge": 10**12, "one more": value + 1, "a fraction": value + 0.5}.items()
        case float():
            yield from {"negative": -5.0, "huge": 1e30, "another": value * 1.5 + 0.25, "infinite": torch.inf}.items()
        case dict():
            yield from {"empty": {}, "a list": [1]}.items() if value else {"a list": [1]}.items()
        case list() | tuple():
            yield from {"shorter": value[:-1], "longer": [*value, 1], "a dict": {}}.items()
    if not isinstance(value, str):
        yield "text", "x"
    if value is not None:
        yield "nothing", None


def with_edit(content, path, value):
    *above, last = path
    edited = node = copy.copy(content)
    for key in above:
        node[key] = list(node[key]) if isinstance(node[key], tuple) else copy.copy(node[key])
        node = node[key]
    node[last] = value
    return edited


def read_by_others(path):
    """What is not for the fit to look at, or without effect; test_faults.py has whole parts that are missing."""
    if path[0] == "loops" and len(path) > 1:
        beyond = path[1] != "fit_loop" or path[2:3] == ("state_dict",) or path == ("loops", "fit_loop")
        return beyond or path[-1] in ("_batches_that_stepped", "is_last_batch")
    return path in (("state_dict",), ("loops",), ("optimizer_states",), ("lr_schedulers",)) or path[-1] == "monitor"


def test_every_edit_of_what_a_fit_reads_is_refused_by_name(resumed):
    content, module = resumed
    taken = []
    for path, value in entries({key: content[key] for key in READ}):
        for kind, other in () if read_by_others(path) else edits(value):
            with contextlib.suppress(CheckpointError):
                check(with_edit(content, path, other), module)
                taken.append((*path, kind))
    # What a run leaves that has no best checkpoints, or was resumed and has not validated since.
    assert [case[-2:] for case in taken] == [
        ("callbacks", "empty"),
        ("current_score", "nothing"),
        ("best_k_models", "empty"),
    ]
