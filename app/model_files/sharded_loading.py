"""A model that no rank ever holds whole: built without memory, sharded, then filled part by part.

Every rank makes or maps one whole tensor at a time and keeps its own part of it; a checkpoint of shards is read by
parts. So a rank needs its shards and one tensor, and nothing goes over the network.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from app.checkpoints.integrity import check_bytes
from app.checkpoints.shards import copy_own_part
from app.checkpoints.weights import is_trained_weights, open_shards, open_trained_weights
from app.errors import CheckpointError, ConfigError
from app.model_files.sources import open_source
from app.model_files.trained_generation import trained_generation_config
from app.model_files.weight_files import check_plain


def fill(model: PreTrainedModel, device: torch.device, *, pretrained: str | None, seed: int) -> None:
    """The weights of the stored model `pretrained`, or those that `build_model` draws from `seed`."""
    if pretrained:
        fill_from(model, device, pretrained)
    else:
        fill_at_random(model, device, seed=seed)


@torch.no_grad()
def fill_at_random(model: PreTrainedModel, device: torch.device, *, seed: int) -> None:
    """The weights that `build_model` draws from this seed, bit for bit.

    Building a model draws twice: in the constructors of its layers, which nobody sees, and in transformers' own
    initialisation, of the decoder before the head is there. Both are done again here, in that order, module by module.

    Args:
        model: From `build_without_memory`, sharded.
        device: Where its shards shall be.
        seed: As for `build_model`.
    """
    _take_memory(model, device)
    filled: set[nn.Parameter] = set()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        for module, construct in _as_built(model):
            sharded = dict(module.named_parameters(recurse=False))
            if construct and isinstance(module, nn.Linear | nn.Embedding):
                _draw(module, module.reset_parameters)
            if construct or not sharded:
                continue
            for name, whole in _draw(module, partial(model._init_weights, module)).items():
                parameter = sharded[name]
                if parameter not in filled:  # of tied ones the first counts
                    filled.add(parameter)
                    copy_own_part(parameter, whole)


def _as_built(model: PreTrainedModel) -> Iterator[tuple[nn.Module, bool]]:
    """Every module twice, as transformers comes to it: when it is constructed (True) and when it is initialised."""
    inner = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    for child in model.children():
        if child in inner:
            yield from _as_built(child)
        else:
            yield from ((module, True) for module in child.modules())
    for child in model.children():
        if child not in inner:
            yield from ((module, False) for module in _children_first(child))
    yield model, False


@torch.no_grad()
def fill_from(model: PreTrainedModel, device: torch.device, path: str, *, field: str = "pretrained") -> None:
    """The weights of a stored model; ranks do this together.

    Args:
        model: From `build_without_memory` with that model's configuration, sharded.
        device: Where its shards shall be.
        path: As for `load_pretrained`. Safetensors and `.ckpt` files are mapped, not read whole; a GGUF file is
            unpacked whole by every rank.
        field: The setting that `path` comes from, for error messages.

    Raises:
        ConfigError: If there is no such model.
        CheckpointError: If its weights are damaged or not all there.
    """
    _take_memory(model, device)
    parameters = dict(model.named_parameters())
    if is_trained_weights(path) and Path(path).is_dir():
        trained = open_trained_weights(path)
        _check_complete(path, parameters, trained.shapes)
        for name in parameters:
            check_plain(path, name, trained.shapes[name][1])
        check_bytes(Path(path))
        model.generation_config = trained_generation_config(trained)
        open_shards(Path(path)).read_into(parameters)
        return
    stored = open_source(path, field=field).weights(None, False)
    model.generation_config = stored.generation_config
    weights = dict(stored.named_parameters())
    _check_complete(path, parameters, weights)
    for name, parameter in parameters.items():
        copy_own_part(parameter, weights[name])


def _check_complete(path: str, wanted: Iterable[str], there: Container[str]) -> None:
    if missing := sorted(name for name in wanted if name not in there):
        raise CheckpointError(f"{path}: {len(missing)} weights of the model are missing, the first is {missing[0]}")


def _take_memory(model: PreTrainedModel, device: torch.device) -> None:
    """Memory for the shards, and what is in no checkpoint: tables such as the rotary frequencies."""
    names: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            names.setdefault(parameter, []).append((module, name))
    model.to_empty(device=device)
    for (module, name), *others in names.values():
        for other, other_name in others:  # tied ones, which to_empty separates
            setattr(other, other_name, getattr(module, name))
    for module in model.modules():
        if any(True for _ in module.buffers(recurse=False)):
            if any(True for _ in module.parameters(recurse=False)):
                got = f"{model.config.model_type} with {type(module).__name__}"
                allowed = "a model whose tables are modules of their own, with a strategy that shards"
                raise ConfigError("model", got=got, allowed=allowed)
            model._init_weights(module)


def _draw(module: nn.Module, initialise: Callable[[], object]) -> dict[str, Tensor]:
    """What `initialise` makes of the module's own parameters, whole and in float32; the module stays as it is."""
    sharded = dict(module.named_parameters(recurse=False))
    try:
        for name, parameter in sharded.items():
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=torch.float32)))
        initialise()
        return dict(module.named_parameters(recurse=False))
    finally:
        for name, parameter in sharded.items():
            setattr(module, name, parameter)


def _children_first(module: nn.Module) -> Iterator[nn.Module]:
    """In the order in which transformers initialises."""
    for child in module.children():
        yield from _children_first(child)
    yield module
