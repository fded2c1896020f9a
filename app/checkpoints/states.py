"""Compares every entry that a run would resume from with the live run, before any of them is used.

torch and Lightning copy the entries of a checkpoint unchecked: an optimizer state of another shape than its parameter
crashes a fused step, and wrong counts or an emptied state train on silently. So each entry is compared, by its name,
with the same entry of the live model, optimizer, schedule, loops and callbacks.
Tested by tests/integration/test_edited_checkpoints.py.
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, CyclicLR, LRScheduler, OneCycleLR

from app.checkpoints.entries import SavedEntry, shown
from app.checkpoints.resumed_config import GivenConfig
from app.checkpoints.weights import OPTIMIZER_STATES, SKIPPED_STEPS_KEY, STATE_DICT
from app.errors import CheckpointError
from app.words import dtype_name

_LOOPS, _SCHEDULERS = "loops", "lr_schedulers"
_INSIST = (
    "--allow_changes '[model.optimizer]' takes the configured ones, and a script starts anew from the weights"
    " (pretrained=CHECKPOINT)"
)
_COUNTS = ("ready", "started", "processed", "completed")  # in the order in which Lightning increments them
_OF_EVALUATION = ("epoch_loop.val_loop.batch_progress", "batch_progress")
_BLOCK = re.compile(r"\.layers\.(\d+)\.")
_STAND_IN = (5, 7, 3, 2)  # sizes that all differ, so that a state's size tells which of the parameter's it follows


class Resumable(Protocol):
    """What a checkpoint is loaded into, and what is known of the run: LayerSkipModule."""

    config: Any  # of transformers
    peft: Any  # LoraSettings, or None
    given_config: GivenConfig | None
    trainer: Trainer

    @property
    def trained(self) -> nn.Module:
        """What of it the optimizer moves."""

    @property
    def exit_sources(self) -> dict[int, list[int]]:
        """By exit layer, the model's blocks that those of its own began as; {} without exit blocks."""

    def state_dict(self) -> dict[str, Any]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def optimizer_over(self, model: nn.Module) -> dict[str, Any]:
        """A new optimizer and schedule for the weights of any model."""


def check_states(checkpoint: Mapping[str, Any], module: Any) -> None:
    """Compare everything that will be read from a checkpoint with what will take it.

    `checkpoint` is the content of a single file, of which tensors without memory (meta) are not compared by value, and
    `module` a `Resumable` when Lightning loads weights, not changed yet. CheckpointError names the first entry that
    does not fit, what it is and what is allowed.
    """
    trainer, fn = module.trainer, module.trainer.state.fn
    saved = SavedEntry(checkpoint, path=trainer.ckpt_path)
    step = saved["global_step"].count()
    _check_weights(saved[STATE_DICT], module.state_dict())
    if fn != TrainerFn.FITTING:
        name = f"{fn.value}_loop"
        if name in checkpoint.get(_LOOPS, {}):
            _check_counts(saved[_LOOPS][name], getattr(trainer, name).state_dict())
        return
    _check_counts(saved[_LOOPS]["fit_loop"], trainer.fit_loop.state_dict())
    _check_progress(saved, step=step)
    skipped = saved[SKIPPED_STEPS_KEY].count(high=step) if SKIPPED_STEPS_KEY in checkpoint else 0
    fresh = module.optimizer_over(module.trained)
    _check_optimizer(saved[OPTIMIZER_STATES], fresh["optimizer"], module, steps=step - skipped)
    _check_schedule(saved, fresh["lr_scheduler"]["scheduler"], step=step)
    _check_callbacks(saved["callbacks"], trainer.callbacks)


def _check_weights(saved: SavedEntry, live: Mapping[str, Tensor]) -> None:
    """Names and shapes must be the model's, and all numbers finite. All weights may have another precision."""
    entries = saved.mapping(live)
    precisions: dict[torch.dtype, torch.dtype] = {}
    for name, weight in live.items():
        entry, tensor = entries[name], entries[name].value
        if not isinstance(tensor, Tensor) or tensor.shape != weight.shape or not tensor.is_floating_point():
            entry.refuse(shown(weight))
        expected = precisions.setdefault(weight.dtype, tensor.dtype)
        if tensor.dtype != expected:
            entry.refuse(f"{dtype_name(expected)}, as the others")
        entry.finite()


# -- loops -------------------------------------------------------------------------------------------------------------


def _check_counts(saved: SavedEntry, like: Mapping[str, Any]) -> None:
    """Check the state of a loop, of which `like` is the live one."""
    state = saved.mapping(like)
    for key, value in like.items():
        entry = state[key]
        if key == "state_dict":  # the states of data loaders, which check them themselves
            loaders = entry.mapping().get("combined_loader")
            for loader in loaders.sequence() if loaders else ():
                loader.mapping()
        elif key in ("total", "current"):
            _check_order(entry.mapping(value))
        elif isinstance(value, dict):
            _check_counts(entry, value)
        elif isinstance(value, bool) and not isinstance(entry.value, bool):
            entry.refuse("true or false")
        else:
            entry.alike(value)
    if "current" in like and saved.keys[-1] not in _OF_EVALUATION:  # a validation may start to count anew at any time
        total, current = state["total"], state["current"]
        for name in current.value:
            done = current[name].count(high=total[name].value)
            expected = total["ready"].value - (current["ready"].value - done)
            total[name].count(low=expected, high=expected)


def _check_order(counts: Mapping[str, SavedEntry]) -> None:
    """At most one is in work: each count is the one before it or one less. An epoch may be ready and not started."""
    first, *others = [counts[name] for name in _COUNTS if name in counts]
    highest = first.count()
    for count in others:
        may_wait = count.keys[-1] != "started" or "epoch_progress" in count.keys
        highest = count.count(low=max(0, first.value - 1) if may_wait else highest, high=highest)


def _check_progress(saved: SavedEntry, *, step: int) -> None:
    """The counts of steps, micro-batches and epochs must agree."""
    loop = saved[_LOOPS]["fit_loop"]
    steps = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"].value
    saved["global_step"].count(low=steps, high=steps)
    loop["epoch_loop.state_dict"]["_batches_that_stepped"].count(high=step + 1)
    loop["epoch_loop.batch_progress"]["total"]["ready"].count(low=step)
    epochs = loop["epoch_progress"]["current"]["processed"].value
    saved["epoch"].count(low=epochs, high=epochs)


# -- optimizer and schedule --------------------------------------------------------------------------------------------


def _check_optimizer(saved: SavedEntry, live: Optimizer, module: Resumable, *, steps: int) -> None:
    """The states must be those that `steps` steps of the live optimizer leave for its parameters."""
    (only,) = saved.sequence(length=1)
    parts, own = only.mapping(("state", "param_groups")), live.state_dict()["param_groups"]
    groups, states = parts["param_groups"], parts["state"]
    groups.alike(own)
    for group, fresh in zip(groups.sequence(), own, strict=True):
        if list(group["params"].value) != fresh["params"]:
            group["params"].refuse(shown(fresh["params"]))
    names = {parameter: name for name, parameter in module.named_parameters()}
    parameters = [parameter for group in live.param_groups for parameter in group["params"]]
    known = sorted(states.mapping().keys() & range(len(parameters)))
    states.mapping(known)
    if not is_torchs(live):
        return
    kinds = _kinds_of_state(module, parameters)
    for index, parameter in enumerate(parameters):
        kind = kinds[parameter.dim(), parameter.dtype]
        if index in known:
            for key, like in kind.items():
                _check_state(states[index].mapping(kind)[key], like, parameter, steps=steps)
        elif kind and not _had_no_gradient(index, known, [names[each] for each in parameters], steps=steps):
            states[index].refuse(f"the states of {names[parameter]}")


def is_torchs(live: Optimizer | LRScheduler) -> bool:
    """Whether the class is torch's own; what the states of another class must be is not known here."""
    return type(live).__module__.startswith("torch.optim")


def _had_no_gradient(index: int, known: Sequence[int], names: Sequence[str], *, steps: int) -> bool:
    """Whether a parameter may lack a state: before the first step, or where its block is above all exits so far."""
    own = _BLOCK.search(names[index])
    reached = [int(found[1]) for each in known if (found := _BLOCK.search(names[each]))]
    return steps == 0 or (own is not None and bool(reached) and int(own[1]) > max(reached))


def _kinds_of_state(module: Resumable, parameters: Sequence[Tensor]) -> dict[tuple[int, torch.dtype], dict[str, Any]]:
    """The states that a step leaves for a parameter, by its dimensions and dtype, found by a step on stand-ins."""
    kinds = sorted({(parameter.dim(), parameter.dtype) for parameter in parameters}, key=str)
    stand_ins = nn.ParameterList([torch.zeros(_STAND_IN[:dim], dtype=dtype) for dim, dtype in kinds])
    optimizer: Optimizer = module.optimizer_over(stand_ins)["optimizer"]
    for group in optimizer.param_groups:
        group.update({"capturable": False} if "capturable" in group else {})  # only accelerators know it
    for stand_in in stand_ins:
        stand_in.grad = torch.zeros_like(stand_in)
    optimizer.step()
    return {kind: dict(optimizer.state[stand_in]) for kind, stand_in in zip(kinds, stand_ins, strict=True)}


def _check_state(saved: SavedEntry, like: object, of: Tensor, *, steps: int) -> None:
    """Compare one state of parameter `of` with that of its stand-in."""
    if not isinstance(like, Tensor):
        saved.alike(like)
        return
    sizes = [of.shape[_STAND_IN.index(size)] if size in _STAND_IN[: of.dim()] else size for size in like.shape]
    saved.alike(torch.empty(sizes, dtype=like.dtype, device="meta"))
    if saved.keys[-1] == "step" and not saved.value.is_meta:
        saved.holding(saved.value.item()).number(low=1, high=steps)
    else:
        saved.finite()


def _check_schedule(saved: SavedEntry, scheduler: LRScheduler, *, step: int) -> None:
    """The one schedule must stand at the run's step, and scale the rates that the optimizer began with."""
    if not is_torchs(scheduler):
        (only,) = saved[_SCHEDULERS].sequence(length=1)
        only.mapping()
        return
    live, state = scheduler.state_dict(), saved[_SCHEDULERS][0]
    saved[_SCHEDULERS].alike([live])
    state["last_epoch"].count(low=step, high=step)
    if not isinstance(scheduler, CosineAnnealingWarmRestarts):  # this class does not count its steps
        state["_step_count"].count(low=step + 1, high=step + 1)
    for key, value in live.items():
        if isinstance(value, bool) and state[key].value is not value:
            state[key].refuse(str(value))
    groups = saved[OPTIMIZER_STATES][0]["param_groups"].sequence()
    for group, base_lr in zip(groups, state["base_lrs"].sequence(), strict=True):
        if base_lr.value != group["initial_lr"].value:
            base_lr.refuse(f"{group['initial_lr'].value}, the optimizer's initial_lr")


def check_optimizer_settings(checkpoint: Mapping[str, Any], module: Resumable) -> None:
    """Raise CheckpointError for optimizer settings that are not as configured, or rates that are not the schedule's."""
    saved = SavedEntry(checkpoint, path=module.trainer.ckpt_path)
    live = module.optimizer_over(module.trained)
    fresh, scheduler = live["optimizer"].param_groups, live["lr_scheduler"]["scheduler"]
    if not is_torchs(scheduler):
        return  # it may set any of them
    moved = ("params", *(("betas", "momentum") if isinstance(scheduler, OneCycleLR | CyclicLR) else ()))
    groups, rates = saved[OPTIMIZER_STATES][0]["param_groups"].sequence(), saved[_SCHEDULERS][0]["_last_lr"].value
    for group, own, rate in zip(groups, fresh, rates, strict=True):
        for key, value in (own | {"lr": rate}).items():
            listed = [list(each) if isinstance(each, tuple) else each for each in (group[key].value, value)]
            if key not in moved and listed[0] != listed[1]:
                group[key].refuse(f"{value!r}, as configured; {_INSIST}")


# -- callbacks ---------------------------------------------------------------------------------------------------------


def _check_callbacks(saved: SavedEntry, live: Sequence[Callback]) -> None:
    """Let a copy of each callback load its saved state. ModelCheckpoint loads anything, so its state is compared."""
    states = saved.mapping()
    for state in states.values():
        state.mapping()
    for callback in live:
        if callback.state_key not in states:
            continue
        state = states[callback.state_key]
        if isinstance(callback, ModelCheckpoint):
            _check_saver(state, callback)
            continue
        try:
            copy.copy(callback).load_state_dict(copy.deepcopy(state.value))
        except CheckpointError:
            raise
        except Exception as error:  # a user's callback may raise anything
            state.refuse(f"what its load_state_dict takes, which raises {error!r}")


def _check_saver(saved: SavedEntry, live: ModelCheckpoint) -> None:
    state = saved.mapping(live.state_dict())
    scores = state["best_k_models"].mapping()
    for score in scores.values():
        _check_score(score)
    for key, entry in state.items():
        needed = key == "kth_value" or (key == "best_model_score" and scores)
        if needed or (key in ("best_model_score", "current_score") and entry.value is not None):
            _check_score(entry)
        elif key.endswith("path"):
            entry.alike("")
    if scores:
        for key, others in (("best_model_path", ()), ("kth_best_model_path", ("",))):
            if state[key].value not in (*scores, *others):
                state[key].refuse("one of best_k_models")
        if state["best_model_score"].value != scores[state["best_model_path"].value].value:
            state["best_model_score"].refuse("that of best_model_path")


def _check_score(saved: SavedEntry) -> None:
    if not isinstance(saved.value, Tensor) or saved.value.shape or not saved.value.is_floating_point():
        saved.refuse("a number, as a float tensor []")
