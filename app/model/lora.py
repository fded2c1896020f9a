"""LoRA (arXiv 2106.09685) on the blocks of a model, by the peft library: W becomes W + alpha / r B A, and W is frozen.

The adapters are part of the model that trains, and are merged wherever its weights are read. Tested by
tests/integration/test_lora.py.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from app.errors import ConfigError, check_range

_FIRST, _SECOND = "lora_A.default.weight", "lora_B.default.weight"  # peft's names of A and B


@dataclass(frozen=True)
class LoraSettings:
    """LoRA on the blocks of a model, which are frozen otherwise, as are the embeddings and the head.

    Adapters are on at every exit and in the full model alike. Adapters that are on in drafts alone cannot be had: the
    keys, values and exit states of a draft would be those of another model, and verification could not go on from them.
    They have no dropout of their own, whose masks a resumed run could not draw again.

    Args:
        r: Rank of an adapter, 1 or more: for a weight [N, D] it trains B [N, r], which begins as 0, and A [r, D].
        alpha: Strength of the adapters, 1 or more; their product is multiplied by alpha / r.
        target_modules: Names of the blocks' projections that get an adapter, such as q_proj; all of them by default.
        train_norms: Train the norms, too: those of the blocks and the final one, which all exits share.

    Raises:
        ConfigError: A setting is out of range.
    """

    r: int = 16
    alpha: int = 32
    target_modules: list[str] | None = None
    train_norms: bool = False

    def __post_init__(self) -> None:
        check_range("peft.r", self.r, low=1)
        check_range("peft.alpha", self.alpha, low=1)

    @property
    def scale(self) -> float:
        """What the product of an adapter's weights is multiplied by."""
        return self.alpha / self.r


def check_goes_with_lora(*, exit_blocks: bool, compile_blocks: bool) -> None:
    """Raise ConfigError for what is on of these, or if the peft library is not installed."""
    if exit_blocks:
        fix = "exit blocks leave the model as it is, and LoRA changes it"
        raise ConfigError("peft", got="LoRA", allowed="null with model.exit_blocks", fix=fix)
    if compile_blocks:
        raise ConfigError("compile_blocks", got=True, allowed="false with model.peft")
    check_has_peft("peft", got="LoRA")


def check_has_peft(field: str, *, got: str) -> None:
    """Raise ConfigError for a setting that needs the peft library, which is not imported yet, if it is not there."""
    if importlib.util.find_spec("peft") is None:
        fix = "pip install 'layerskip-lightning[peft]'"
        raise ConfigError(field, got=got, allowed="null without the peft library", fix=fix)


def refused_strategy(name: str) -> ConfigError:
    """The error about a strategy that spreads a model with adapters over devices in parts."""
    return ConfigError("trainer.strategy", got=name, allowed="one device or ddp with model.peft")


def add_adapters(model: PreTrainedModel, settings: LoraSettings, *, seed: int, without_memory: bool = False) -> None:
    """Freeze a model and give its blocks adapters, in place, whose random weights depend on `seed` and the shapes.

    With `without_memory` the adapters are on the meta device. ConfigError if the blocks have no such projections.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds, of those who use it

    config = LoraConfig(r=settings.r, lora_alpha=settings.alpha, target_modules=targets_of(model, settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, low_cpu_mem_usage=without_memory)
    for norm in norms_of(model).values() if settings.train_norms else ():
        norm.requires_grad_(True)


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    """The norms of a model by name: the modules whose own weights are vectors, but for the biases of linear layers."""
    norms = {}
    for name, module in model.named_modules():
        dims = {weight.dim() for weight in module.parameters(recurse=False)}
        if dims == {1} and not isinstance(module, nn.Linear):
            norms[name] = module
    return norms


def targets_of(model: PreTrainedModel, settings: LoraSettings) -> list[str]:
    """The names of the projections that get an adapter, or ConfigError if the blocks of the model have no such ones."""
    modules = model.get_decoder().layers.named_modules()
    names = sorted({name.rpartition(".")[2] for name, module in modules if isinstance(module, nn.Linear)})
    targets = names if settings.target_modules is None else settings.target_modules
    if not targets or not {*targets} <= {*names}:
        allowed = f"one or more of {' | '.join(names)}, the projections of the blocks"
        raise ConfigError("peft.target_modules", got=targets, allowed=allowed)
    return targets


def adapters_of(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the weights that belong to adapters, by name."""
    return {name: weight for name, weight in weights.items() if name.endswith((_FIRST, _SECOND))}


def merged_shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shapes and dtypes of the weights once the adapters among them are merged, by the names of the plain model."""
    adapters = adapters_of(weights)
    own = {name: weight for name, weight in weights.items() if name not in adapters}
    return {name.replace(".base_layer.", "."): (weight.shape, weight.dtype) for name, weight in own.items()}


def merged_weight(weights: Mapping[str, Tensor], name: str, *, scale: float) -> Tensor:
    """A weight of the plain model, by a name in `merged_shapes`: W + scale B A, summed in float32 at least, typed as W.

    `weights` are those of the model with adapters, by name. One without an adapter is returned as it is.
    """
    owner, _, kind = name.rpartition(".")
    if (base := weights.get(f"{owner}.base_layer.{kind}")) is None:
        return weights[name]
    if kind != "weight":
        return base
    exact = torch.promote_types(base.dtype, torch.float32)
    first, second = (weights[f"{owner}.{factor}"].to(exact) for factor in (_FIRST, _SECOND))
    return torch.addmm(base.to(exact), second, first, alpha=scale).to(base.dtype)
