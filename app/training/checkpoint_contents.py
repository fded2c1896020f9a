"""What is in a checkpoint, as one file or as a directory of shards, and how the one becomes the other.

One file is as Lightning's: `optimizer_states` count parameters through the optimizer's groups. A directory has its
tensors in shards, called `state_dict.NAME` and `optimizer_0.state.NAME.KEY` by the names of the parameters, and all
else in CONTENT_FILE, `optimizer_states` without their tensors included: nothing in shards has to be unpickled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from app.errors import CheckpointError
from app.model.shards import Shards
from app.model.trained_weights import read_plain

CONTENT_FILE = "meta.pt"  # Lightning's name for it
STATE_DICT = "state_dict"
OPTIMIZER_STATES = "optimizer_states"

OptimizerState = dict[str, Any]  # {"state": {parameter: {key: value}}, "param_groups": [{"params": [parameter]}]}


def read_directory(path: Path) -> tuple[dict[str, Any], Shards]:
    """A directory's content without its tensors, and those to be read.

    Raises:
        CheckpointError: If it is not all there, damaged, or its optimizer states are not as ours.
    """
    if not (path / CONTENT_FILE).is_file():
        raise CheckpointError(f"checkpoint {path}: not all there ({CONTENT_FILE} is missing); use an earlier one")
    content = read_plain(path / CONTENT_FILE)
    shards = Shards(path, prefix="")
    if OPTIMIZER_STATES not in content:
        raise CheckpointError(
            f"checkpoint {path}: its optimizer states are not as layerskip writes them; its weights alone can be used"
            " (--model.pretrained)"
        )
    return content, shards


def read_whole(path: Path, *, keep: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> dict[str, Any]:
    """A directory of shards as the content of a single file.

    Args:
        path: The directory.
        keep: Where each tensor is kept until all are read; in memory by default.

    Raises:
        CheckpointError: As `read_directory`; or a shard is damaged.
    """
    content, shards = read_directory(path)
    prefix = f"{STATE_DICT}."
    content[STATE_DICT] = {
        key.removeprefix(prefix): keep(shards.read(key)) for key in shards.shapes if key.startswith(prefix)
    }
    if not content[STATE_DICT]:
        raise CheckpointError(f"checkpoint {path}: no weights are in its shards; use an earlier one")
    content[OPTIMIZER_STATES] = [
        by_position(filled(state, {key: keep(shards.read(key)) for key in state_keys(shards.shapes, index)}, index))
        for index, state in enumerate(content[OPTIMIZER_STATES])
    ]
    return content


# -- optimizer states ------------------------------------------------------------------------------------------------


def parameter_names(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of an optimizer's parameters, in the order in which its state counts them."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def by_name(state: OptimizerState, names: Sequence[str]) -> OptimizerState:
    """From positions of parameters to their names."""
    return _renamed(state, dict(enumerate(names)))


def by_position(state: OptimizerState) -> OptimizerState:
    """From names of parameters to their positions."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    return _renamed(state, {name: position for position, name in enumerate(names)})


def without_tensors(state: OptimizerState, index: int) -> tuple[OptimizerState, dict[str, Tensor]]:
    """A state by name without its tensors, and those by the keys of optimizer `index` in shards."""
    prefix = _prefix(index)
    tensors: dict[str, Tensor] = {}
    plain = {}
    for name, entries in state["state"].items():
        plain[name] = {key: value for key, value in entries.items() if not isinstance(value, Tensor)}
        tensors |= {f"{prefix}{name}.{key}": value for key, value in entries.items() if isinstance(value, Tensor)}
    return {"state": plain, "param_groups": state["param_groups"]}, tensors


def filled(state: OptimizerState, tensors: Mapping[str, Tensor], index: int) -> OptimizerState:
    """The inverse of `without_tensors`."""
    entries = {name: dict(plain) for name, plain in state["state"].items()}
    for key, tensor in tensors.items():
        entries[parameter_of(key, index)][key.rpartition(".")[2]] = tensor
    return {"state": entries, "param_groups": state["param_groups"]}


def parameter_of(key: str, index: int) -> str:
    """The parameter's name in a key of optimizer `index`."""
    return key.removeprefix(_prefix(index)).rpartition(".")[0]


def state_keys(keys: Mapping[str, Any], index: int) -> list[str]:
    """Those of optimizer `index`."""
    return [key for key in keys if key.startswith(_prefix(index))]


def _prefix(index: int) -> str:
    return f"optimizer_{index}.state."


def _renamed(state: OptimizerState, names: Mapping[Any, Any]) -> OptimizerState:
    groups = [{**group, "params": [names[each] for each in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[each]: entries for each, entries in state["state"].items()}, "param_groups": groups}
