"""Fills a model that is spread over ranks, none of which ever holds it whole. Tested by test_sharded_loading.py.

Every rank makes or maps one whole tensor at a time and keeps its part of it; a checkpoint of shards is read by parts.
So a rank needs memory for its shards and one tensor, and nothing goes over the network.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from app.checkpoints.integrity import check_bytes, check_finite
from app.checkpoints.shards import copy_own_part
from app.checkpoints.weights import is_trained_weights, open_shards, open_trained_weights
from app.errors import CheckpointError, ConfigError
from app.model_files.generation_config import trained_generation_config
from app.model_files.loading import check_plain
from app.model_files.open import open_source


@torch.no_grad()
def fill(model: PreTrainedModel, device: torch.device, *, pretrained: str | None, seed: int) -> None:
    """Give a model from `build_without_memory`, sharded, its weights on `device`; all ranks call this together.

    The weights are those of `load_pretrained(pretrained)`, whose errors this raises, or for None those that
    `build_model` draws from `seed`. Safetensors and `.ckpt` files are mapped, not read whole; every rank unpacks the
    whole of a GGUF file. A model whose tables cannot be sharded is a ConfigError.
    """
    _take_memory(model, device)
    if pretrained:
        _fill_from(model, pretrained)
        check_finite(pretrained, dict(model.named_parameters()))
    else:
        _fill_at_random(model, seed=seed)


def _fill_at_random(model: PreTrainedModel, *, seed: int) -> None:
    """Draw the weights that `build_model` draws from this seed, bit for bit.

    Building a model draws twice: in the constructors of its layers, and in transformers' own initialisation, which
    overwrites that and comes to the decoder before the head is built. Both are repeated here in that order.
    """
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
                if parameter not in filled:  # the first of tied ones counts
                    filled.add(parameter)
                    copy_own_part(parameter, whole)


def _as_built(model: PreTrainedModel) -> Iterator[tuple[nn.Module, bool]]:
    """Every module twice, in transformers' order: when it is constructed (True) and when it is initialised (False)."""
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


def _fill_from(model: PreTrainedModel, path: str) -> None:
    parameters = dict(model.named_parameters())
    if not (is_trained_weights(path) and Path(path).is_dir()):
        stored = open_source(path, field="pretrained").weights(None, False)
        model.generation_config = stored.generation_config
        weights = dict(stored.named_parameters())
        for name, parameter in parameters.items():
            copy_own_part(parameter, weights[name])
        return
    trained = open_trained_weights(path)
    if missing := sorted(parameters.keys() - trained.shapes.keys()):
        raise CheckpointError(f"{path}: {len(missing)} weights of the model are missing, the first is {missing[0]}")
    for name in parameters:
        check_plain(path, name, trained.shapes[name][1])
    check_bytes(trained.path)
    model.generation_config = trained_generation_config(trained)
    open_shards(trained.path).read_into(parameters)


def _take_memory(model: PreTrainedModel, device: torch.device) -> None:
    """Allocate the shards, and compute the tables that no checkpoint holds, such as rotary frequencies."""
    names: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            names.setdefault(parameter, []).append((module, name))
    model.to_empty(device=device)
    for (module, name), *others in names.values():
        for other, other_name in others:  # to_empty separates tied parameters
            setattr(other, other_name, getattr(module, name))
    for module in model.modules():
        if any(True for _ in module.buffers(recurse=False)):
            if any(True for _ in module.parameters(recurse=False)):
                got = f"{model.config.model_type} with {type(module).__name__}"
                allowed = "a model whose tables are modules of their own, with a strategy that shards"
                raise ConfigError("model", got=got, allowed=allowed)
            model._init_weights(module)


def _draw(module: nn.Module, initialise: Callable[[], object]) -> dict[str, Tensor]:
    """The whole parameters, in float32, that `initialise` draws for the module, whose own parameters stay."""
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
    """The modules in the order in which transformers initialises them."""
    for child in module.children():
        yield from _children_first(child)
    yield module
