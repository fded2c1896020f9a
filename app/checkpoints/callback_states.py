"""The states of callbacks in a checkpoint, looked at before a run goes on from them."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from app.checkpoints.entries import Entry, SavedEntries
from app.errors import CheckpointError

CALLBACKS = "callbacks"


def check_callbacks(saved: SavedEntries, got: object, live: Sequence[Callback]) -> None:
    """Refuse states that the callbacks of a run cannot go on from, before any of them is changed.

    Each callback is asked by letting a copy of it load its state. Lightning's savers of checkpoints take anything.

    Args:
        saved: Of the checkpoint.
        got: Its states by the callbacks' names.
        live: The callbacks of the run.

    Raises:
        CheckpointError: Naming the first entry that does not fit.
    """
    entry: Entry = (CALLBACKS,)
    states = saved.any_keys(entry, got)
    for key, state in states.items():
        saved.any_keys((*entry, key), state)
    for callback in live:
        if callback.state_key not in states:
            continue
        below, state = (*entry, callback.state_key), states[callback.state_key]
        if isinstance(callback, ModelCheckpoint):
            _check_saver(saved, below, state, callback)
            continue
        try:
            copy.copy(callback).load_state_dict(copy.deepcopy(state))
        except CheckpointError:
            raise
        except Exception as error:  # of a user's own callback, anything
            saved.refuse(below, state, f"what its load_state_dict takes, which raises {error!r}")


def _check_saver(saved: SavedEntries, entry: Entry, got: object, live: ModelCheckpoint) -> None:
    """The best checkpoints and their scores."""
    state = saved.keys(entry, got, live.state_dict())
    scores = saved.any_keys((*entry, "best_k_models"), state["best_k_models"])
    for path, score in scores.items():
        _check_score(saved, (*entry, "best_k_models", path), score)
    for key, value in state.items():
        needed = key == "kth_value" or (key == "best_model_score" and scores)  # a resumed saver has no current one
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
