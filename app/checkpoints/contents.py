"""What is in a checkpoint, as a single file or as a directory of shards, and how one form becomes the other.

A single file is as Lightning writes it: `optimizer_states` number the parameters in the order of the optimizer's
groups. In a directory all tensors are in shards, under the keys `state_dict.NAME` and `optimizer_INDEX.state.NAME.KEY`
with the names of the parameters. Everything else is in CONTENT_FILE, with `optimizer_states` that lack their tensors,
so that no shard has to be unpickled. Tested by tests/distributed/test_checkpoints.py.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from app.checkpoints.entries import SavedEntry
from app.checkpoints.shards import Shards
from app.checkpoints.weights import HF_CONFIG_KEY, OPTIMIZER_STATES, STATE_DICT, read_plain
from app.errors import CheckpointError

_VERSION, _STEP = "pytorch-lightning_version", "global_step"
_LOOPS, _FIT_LOOP = "loops", "fit_loop"
_LR_SCHEDULERS = "lr_schedulers"
_KINDS: Mapping[str, type] = {  # of the entries that Lightning and this package read without further checks
    _VERSION: str,
    _STEP: int,
    STATE_DICT: dict,
    OPTIMIZER_STATES: list,
    _LR_SCHEDULERS: list,
    _LOOPS: dict,
    "callbacks": dict,
    HF_CONFIG_KEY: dict,
}

OptimizerState = dict[str, Any]  # {"state": {parameter: {key: value}}, "param_groups": [{"params": [parameter]}]}


def read_file(path: Path, *, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """The content of a single file. Raises CheckpointError if `read_plain` or Lightning cannot read it."""
    content = read_plain(path, map_location=map_location, mmap=mmap)
    _check_kinds(path, content, needed=(_VERSION, _STEP, STATE_DICT))
    return content


def read_directory(path: Path) -> tuple[dict[str, Any], Shards]:
    """The content of a directory without its tensors, and these, not read yet.

    CheckpointError if it is incomplete or damaged, or layerskip did not write its optimizer states.
    """
    content, shards = read_plain(path), Shards(path, prefix="")
    if OPTIMIZER_STATES not in content:
        raise CheckpointError(
            f"checkpoint {path}: its optimizer states are not as layerskip writes them; its weights alone can be used"
            " (--model.pretrained)"
        )
    _check_kinds(path, content, needed=(_VERSION, _STEP))
    return content, shards


def _check_kinds(path: Path, content: Mapping[str, Any], *, needed: Sequence[str]) -> None:
    for key in needed:
        if key not in content:
            raise CheckpointError(f"checkpoint {path}: not a Lightning checkpoint (no {key!r} in it)")
    for key, kind in _KINDS.items():
        if key in content and not isinstance(content[key], kind):
            raise CheckpointError.unusable(path, f"damaged or foreign, its {key!r} is no {kind.__name__}")
    if not re.match(r"2\.\d+\.\d", content[_VERSION]):  # Lightning would migrate it, whatever it holds
        SavedEntry(content, path=path)[_VERSION].refuse("2.x")


def refuse_weights_alone(path: str | Path | None, content: Mapping[str, Any]) -> None:
    """Raise CheckpointError if a checkpoint holds weights but no run, naming what is missing."""
    held = {
        OPTIMIZER_STATES: bool(content.get(OPTIMIZER_STATES)),  # a directory has a list, which may be empty
        _LR_SCHEDULERS: _LR_SCHEDULERS in content,
        _LOOPS: isinstance(content.get(_LOOPS, {}).get(_FIT_LOOP), dict),
    }
    if missing := [key for key, is_there in held.items() if not is_there]:
        raise CheckpointError(
            f"checkpoint {path}: weights only, no run to go on with (no {', '.join(missing)} in it):"
            f" --model.pretrained {path} starts a new run from them"
        )


def read_whole(path: Path, *, keep: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> dict[str, Any]:
    """A directory of shards as the content of a single file; `keep` may store each tensor elsewhere than in memory."""
    content, shards = read_directory(path)
    return made_whole(path, content, shards.shapes, lambda key: keep(shards.read(key)))


def made_whole(
    path: Path, content: Mapping[str, Any], keys: Collection[str], read: Callable[[str], Tensor]
) -> dict[str, Any]:
    """The content of a directory as that of a single file, with the tensor `read(key)` for each of the shards' keys.

    CheckpointError if no weights are in the shards, or the optimizer states do not fit their own parameters.
    """
    prefix = f"{STATE_DICT}."
    weights = {key.removeprefix(prefix): read(key) for key in keys if key.startswith(prefix)}
    if not weights:
        raise CheckpointError.unusable(path, "no weights are in its shards")
    states = []
    for index, state in enumerate(SavedEntry(content, path=path)[OPTIMIZER_STATES].sequence()):
        own = state_keys(keys, index)
        _check_named(state, own, index)
        states.append(from_shards(state.value, {key: read(key) for key in own}, index))
    return {**content, STATE_DICT: weights, OPTIMIZER_STATES: states}


def _check_named(saved: SavedEntry, keys: Sequence[str], index: int) -> None:
    """Check that the states of optimizer `index` are those of its parameters, each named once."""
    parts, names = saved.mapping(("state", "param_groups")), set[object]()
    for group in parts["param_groups"].sequence():
        for name in group["params"].sequence():
            if not isinstance(name.value, str) or name.value in names:
                name.refuse("the name of a parameter, once")
            names.add(name.value)
    in_shards = {parameter_of(key, index) for key in keys}
    in_content = parts["state"].mapping()
    for name, states in parts["state"].mapping(in_shards | (in_content.keys() & names)).items():
        if name not in names:
            states.refuse("states of the parameters in param_groups alone")
        states.mapping()


# -- optimizer states ------------------------------------------------------------------------------------------------


def parameter_names(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of an optimizer's parameters, in the order in which its state numbers them."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def to_shards(state: OptimizerState, names: Sequence[str], index: int) -> tuple[OptimizerState, dict[str, Tensor]]:
    """The state of optimizer `index` without its tensors, by the names of the parameters; and these by shard key."""
    tensors: dict[str, Tensor] = {}
    plain = {}
    for each, entries in state["state"].items():
        plain[names[each]] = {key: value for key, value in entries.items() if not isinstance(value, Tensor)}
        prefix = f"{_prefix(index)}{names[each]}."
        tensors |= {f"{prefix}{key}": value for key, value in entries.items() if isinstance(value, Tensor)}
    return {"state": plain, "param_groups": _regrouped(state, names)}, tensors


def from_shards(state: OptimizerState, tensors: Mapping[str, Tensor], index: int) -> OptimizerState:
    """The inverse of `to_shards`, which numbers the parameters."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    indices = {name: each for each, name in enumerate(names)}
    entries = {indices[name]: dict(plain) for name, plain in state["state"].items()}
    for key, tensor in tensors.items():
        entries[indices[parameter_of(key, index)]][key.rpartition(".")[2]] = tensor
    return {"state": entries, "param_groups": _regrouped(state, indices)}


def parameter_of(key: str, index: int) -> str:
    """The parameter's name in a shard key of optimizer `index`."""
    return key.removeprefix(_prefix(index)).rpartition(".")[0]


def state_keys(keys: Collection[str], index: int) -> list[str]:
    """The shard keys of optimizer `index`."""
    return [key for key in keys if key.startswith(_prefix(index))]


def _prefix(index: int) -> str:
    return f"optimizer_{index}.state."


def _regrouped(state: OptimizerState, other: Any) -> list[dict[str, Any]]:
    """The groups, with `other[parameter]` for each parameter."""
    return [{**group, "params": [other[each] for each in group["params"]]} for group in state["param_groups"]]
