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

from app.checkpoints.entries import MISSING, Entry, SavedEntries, shown
from app.checkpoints.weights import OPTIMIZER_STATES, SKIPPED_STEPS_KEY, STATE_DICT
from app.errors import CheckpointError

_STEP, _EPOCH = "global_step", "epoch"
_LOOPS, _SCHEDULERS, _CALLBACKS = "loops", "lr_schedulers", "callbacks"
_LOADERS = "combined_loader"
_INSIST = (
    "--allow_changes '[model.optimizer]' takes the configured ones, and a script starts anew from the weights"
    " (pretrained=CHECKPOINT)"
)
_COUNTS = ("ready", "started", "processed", "completed")  # in the order in which Lightning increments them
_OF_EVALUATION = ("epoch_loop.val_loop.batch_progress", "batch_progress")
_BLOCK = re.compile(r"\.layers\.(\d+)\.")
_STAND_IN = (5, 7, 3, 2)  # sizes that all differ, so that a state's size tells which of the parameter's it follows


class Resumable(Protocol):
    """What a checkpoint is loaded into: LayerSkipModule."""

    trainer: Trainer
    model: Any

    def state_dict(self) -> dict[str, Any]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def optimizer_over(self, model: nn.Module) -> dict[str, Any]:
        """A new optimizer and schedule for the weights of any model."""


def check_states(checkpoint: Mapping[str, Any], module: Any) -> None:
    """Compare everything that will be read from a checkpoint with what will take it.

    Args:
        checkpoint: The content of a single file. The values of tensors without memory (meta) are not compared.
        module: A `Resumable` when Lightning loads weights, not changed yet.

    Raises:
        CheckpointError: Naming the first entry that does not fit, what it is and what is allowed.
    """
    trainer = module.trainer
    saved = SavedEntries(trainer.ckpt_path)
    step = saved.count((_STEP,), checkpoint.get(_STEP))
    _check_weights(saved, checkpoint[STATE_DICT], module.state_dict())
    loops, fn = checkpoint.get(_LOOPS, {}), trainer.state.fn
    if fn != TrainerFn.FITTING:
        name = f"{fn.value}_loop"
        if name in loops:
            _check_counts(saved, (_LOOPS, name), loops[name], getattr(trainer, name).state_dict())
        return
    fit_loop = loops["fit_loop"]
    _check_counts(saved, (_LOOPS, "fit_loop"), fit_loop, trainer.fit_loop.state_dict())
    _check_progress(saved, fit_loop, step=step, epoch=checkpoint.get(_EPOCH))
    skipped = saved.count((SKIPPED_STEPS_KEY,), checkpoint.get(SKIPPED_STEPS_KEY, 0), high=step)
    fresh = module.optimizer_over(module.model)
    _check_optimizer(saved, checkpoint[OPTIMIZER_STATES], fresh["optimizer"], module, steps=step - skipped)
    _check_schedule(saved, checkpoint, fresh["lr_scheduler"]["scheduler"], step=step)
    _check_callbacks(saved, checkpoint.get(_CALLBACKS), trainer.callbacks)


def _check_weights(saved: SavedEntries, got: object, live: Mapping[str, Tensor]) -> None:
    """Names and shapes must be the model's, and all numbers finite. All weights may have another precision."""
    weights = saved.keys((STATE_DICT,), got, live)
    precisions: dict[torch.dtype, torch.dtype] = {}
    for name, weight in live.items():
        tensor = weights[name]
        if not isinstance(tensor, Tensor) or tensor.shape != weight.shape or not tensor.is_floating_point():
            saved.refuse((STATE_DICT, name), tensor, shown(weight))
        expected = precisions.setdefault(weight.dtype, tensor.dtype)
        if tensor.dtype != expected:
            saved.refuse((STATE_DICT, name), tensor, f"{str(expected).removeprefix('torch.')}, as the others")
        saved.finite((STATE_DICT, name), tensor)


# -- loops -------------------------------------------------------------------------------------------------------------


def _check_counts(saved: SavedEntries, entry: Entry, got: object, like: Mapping[str, Any]) -> None:
    """Check the state of a loop, of which `like` is the live one."""
    state = saved.keys(entry, got, like)
    for key, value in like.items():
        below = (*entry, key)
        if key == "state_dict":  # the states of data loaders, which check them themselves
            loaders = saved.any_keys(below, state[key]).get(_LOADERS, [])
            for index, each in enumerate(saved.sequence((*below, _LOADERS), loaders)):
                saved.any_keys((*below, _LOADERS, index), each)
        elif key in ("total", "current"):
            _check_order(saved, below, saved.keys(below, state[key], value))
        elif isinstance(value, dict):
            _check_counts(saved, below, state[key], value)
        elif isinstance(value, bool) and not isinstance(state[key], bool):
            saved.refuse(below, state[key], "true or false")
        else:
            saved.alike(below, state[key], value)
    if "current" in like and entry[-1] not in _OF_EVALUATION:  # a validation may start to count anew at any time
        total, current = state["total"], state["current"]
        for name in current:
            saved.count((*entry, "current", name), current[name], high=total[name])
            expected = total["ready"] - (current["ready"] - current[name])
            saved.count((*entry, "total", name), total[name], low=expected, high=expected)


def _check_order(saved: SavedEntries, entry: Entry, counts: Mapping[str, Any]) -> None:
    """At most one is in work: each count is the one before it or one less. An epoch may be ready and not started."""
    first, *others = [name for name in _COUNTS if name in counts]
    highest = saved.count((*entry, first), counts[first])
    for name in others:
        lowest = highest if name == "started" and "epoch_progress" not in entry else max(0, counts[first] - 1)
        highest = saved.count((*entry, name), counts[name], low=lowest, high=highest)


def _check_progress(saved: SavedEntries, fit_loop: Mapping[str, Any], *, step: int, epoch: object) -> None:
    """The counts of steps, micro-batches and epochs must agree."""
    entry = (_LOOPS, "fit_loop")
    steps = fit_loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"]
    saved.count((_STEP,), step, low=steps, high=steps)
    counted = fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"]
    saved.count((*entry, "epoch_loop.state_dict", "_batches_that_stepped"), counted, high=step + 1)
    batches = fit_loop["epoch_loop.batch_progress"]["total"]["ready"]
    saved.count((*entry, "epoch_loop.batch_progress", "total", "ready"), batches, low=step)
    epochs = fit_loop["epoch_progress"]["current"]["processed"]
    saved.count((_EPOCH,), epoch, low=epochs, high=epochs)


# -- optimizer and schedule --------------------------------------------------------------------------------------------


def _check_optimizer(saved: SavedEntries, got: object, live: Optimizer, module: Resumable, *, steps: int) -> None:
    """The states must be those that `steps` steps of the live optimizer leave for its parameters."""
    (only,) = saved.sequence((OPTIMIZER_STATES,), got, length=1)
    entry: Entry = (OPTIMIZER_STATES, 0)
    groups, own = saved.keys(entry, only, ("state", "param_groups"))["param_groups"], live.state_dict()["param_groups"]
    saved.alike((*entry, "param_groups"), groups, own)
    for number, (group, fresh) in enumerate(zip(groups, own, strict=True)):
        if list(group["params"]) != fresh["params"]:
            saved.refuse((*entry, "param_groups", number, "params"), group["params"], shown(fresh["params"]))
    names = {parameter: name for name, parameter in module.named_parameters()}
    parameters = [parameter for group in live.param_groups for parameter in group["params"]]
    state, entry = only["state"], (*entry, "state")
    known = [index for index in range(len(parameters)) if not isinstance(state, dict) or index in state]
    saved.keys(entry, state, known)
    if not is_torchs(live):
        return
    kinds = _kinds_of_state(module, parameters)
    for index, parameter in enumerate(parameters):
        kind, below = kinds[parameter.dim(), parameter.dtype], (*entry, index)
        if index in state:
            for key, like in kind.items():
                value = saved.keys(below, state[index], kind)[key]
                _check_state(saved, (*below, key), value, like, parameter, steps=steps)
        elif kind and not _had_no_gradient(index, known, [names[each] for each in parameters], steps=steps):
            saved.refuse(below, MISSING, f"the states of {names[parameter]}")


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


def _check_state(saved: SavedEntries, entry: Entry, got: object, like: object, of: Tensor, *, steps: int) -> None:
    """Compare one state of parameter `of` with that of its stand-in."""
    if not isinstance(like, Tensor):
        saved.alike(entry, got, like)
        return
    sizes = [of.shape[_STAND_IN.index(size)] if size in _STAND_IN[: of.dim()] else size for size in like.shape]
    saved.alike(entry, got, torch.empty(sizes, dtype=like.dtype, device="meta"))
    assert isinstance(got, Tensor)
    if not got.is_meta and entry[-1] == "step":
        saved.number(entry, got.item(), low=1, high=steps)
    else:
        saved.finite(entry, got)


def _check_schedule(saved: SavedEntries, checkpoint: Mapping[str, Any], scheduler: LRScheduler, *, step: int) -> None:
    """The one schedule must stand at the run's step, and scale the rates that the optimizer began with."""
    if not is_torchs(scheduler):
        saved.sequence((_SCHEDULERS,), checkpoint[_SCHEDULERS], length=1)
        saved.any_keys((_SCHEDULERS, 0), checkpoint[_SCHEDULERS][0])
        return
    live = scheduler.state_dict()
    saved.alike((_SCHEDULERS,), checkpoint[_SCHEDULERS], [live])
    state, entry = checkpoint[_SCHEDULERS][0], (_SCHEDULERS, 0)
    saved.count((*entry, "last_epoch"), state["last_epoch"], low=step, high=step)
    if not isinstance(scheduler, CosineAnnealingWarmRestarts):  # this class does not count its steps
        saved.count((*entry, "_step_count"), state["_step_count"], low=step + 1, high=step + 1)
    for key, value in live.items():
        if isinstance(value, bool) and state[key] is not value:
            saved.refuse((*entry, key), state[key], str(value))
    for index, group in enumerate(checkpoint[OPTIMIZER_STATES][0]["param_groups"]):
        if state["base_lrs"][index] != group["initial_lr"]:
            allowed = f"{group['initial_lr']}, the optimizer's initial_lr"
            saved.refuse((*entry, "base_lrs", index), state["base_lrs"][index], allowed)


def check_optimizer_settings(checkpoint: Mapping[str, Any], module: Resumable) -> None:
    """Refuse optimizer settings other than the configured ones, and rates other than the schedule's.

    `check_states` must have passed. Raises CheckpointError naming the first setting.
    """
    saved = SavedEntries(module.trainer.ckpt_path)
    live = module.optimizer_over(module.model)
    fresh, scheduler = live["optimizer"].param_groups, live["lr_scheduler"]["scheduler"]
    if not is_torchs(scheduler):
        return  # it may set any of them
    moved = ("params", *(("betas", "momentum") if isinstance(scheduler, OneCycleLR | CyclicLR) else ()))
    rates = checkpoint[_SCHEDULERS][0]["_last_lr"]
    for index, (group, own) in enumerate(zip(checkpoint[OPTIMIZER_STATES][0]["param_groups"], fresh, strict=True)):
        for key, value in (own | {"lr": rates[index]}).items():
            listed = [list(each) if isinstance(each, tuple) else each for each in (group[key], value)]
            if key not in moved and listed[0] != listed[1]:
                entry = (OPTIMIZER_STATES, 0, "param_groups", index, key)
                saved.refuse(entry, group[key], f"{value!r}, as configured; {_INSIST}")


# -- callbacks ---------------------------------------------------------------------------------------------------------


def _check_callbacks(saved: SavedEntries, got: object, live: Sequence[Callback]) -> None:
    """Let a copy of each callback load its saved state. ModelCheckpoint loads anything, so its state is compared."""
    states = saved.any_keys((_CALLBACKS,), got)
    for key, state in states.items():
        saved.any_keys((_CALLBACKS, key), state)
    for callback in live:
        if callback.state_key not in states:
            continue
        entry, state = (_CALLBACKS, callback.state_key), states[callback.state_key]
        if isinstance(callback, ModelCheckpoint):
            _check_saver(saved, entry, state, callback)
            continue
        try:
            copy.copy(callback).load_state_dict(copy.deepcopy(state))
        except CheckpointError:
            raise
        except Exception as error:  # a user's callback may raise anything
            saved.refuse(entry, state, f"what its load_state_dict takes, which raises {error!r}")


def _check_saver(saved: SavedEntries, entry: Entry, got: object, live: ModelCheckpoint) -> None:
    state = saved.keys(entry, got, live.state_dict())
    scores = saved.any_keys((*entry, "best_k_models"), state["best_k_models"])
    for path, score in scores.items():
        _check_score(saved, (*entry, "best_k_models", path), score)
    for key, value in state.items():
        needed = key == "kth_value" or (key == "best_model_score" and scores)
        if needed or (key in ("best_model_score", "current_score") and value is not None):
            _check_score(saved, (*entry, key), value)
        elif key.endswith("path"):
            saved.alike((*entry, key), value, "")
    if scores:
        for key, others in (("best_model_path", ()), ("kth_best_model_path", ("",))):
            if state[key] not in (*scores, *others):
                saved.refuse((*entry, key), state[key], "one of best_k_models")
        if state["best_model_score"] != scores[state["best_model_path"]]:
            saved.refuse((*entry, "best_model_score"), state["best_model_score"], "that of best_model_path")


def _check_score(saved: SavedEntries, entry: Entry, got: object) -> None:
    if not isinstance(got, Tensor) or got.shape or not got.is_floating_point():
        saved.refuse(entry, got, "a number, as a float tensor []")
