"""Splits blocks over tensor-parallel ranks, which each hold some attention heads and some of the MLP's width.

Queries, keys, values, gate and up are split by outputs, o_proj and down_proj by inputs, so that a block makes two sums
over the ranks (arXiv 1909.08053 section 3). All other parameters are on every rank, and every rank sees whole rows.
Parameters are DTensors, so that optimizers, gradient norms and checkpoints see one model; modules run on their local
parts. transformers' own `tp_plan` is not used: in release 5.24 a step through a llama's block makes seven sums instead
of four, and after two backwards the gradients of qwen3's `q_norm` are 85 % off.

Tested by tests/distributed/test_tensor_parallel.py.
"""

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from transformers import PreTrainedModel

from app.errors import ConfigError
from app.model.class_swap import swap_class

_FIELD = "tensor_parallel_size"
_BY_OUTPUTS = frozenset({"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"})
_BY_INPUTS = frozenset({"o_proj", "down_proj"})
_OF_ONE_HEAD = frozenset({"q_norm", "k_norm"})  # norms over the width of a head, which all heads share


class Ranks:
    """The tensor-parallel ranks of a model; `on` is False while each of them has the whole weights."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh, self.on = mesh, True

    def spread(self, hidden: Tensor) -> Tensor:
        """Hand every rank's copy to work that is split; the backward sums its gradients over the ranks."""
        whole = DTensor.from_local(hidden, self.mesh, [Replicate()], run_check=False)
        return whole.to_local(grad_placements=[Partial()])

    def add_up(self, part: Tensor) -> Tensor:
        parts = DTensor.from_local(part, self.mesh, [Partial()], run_check=False)
        return parts.redistribute(placements=[Replicate()]).to_local()


class LocalParameters(nn.Module):
    """Mixin over a module that runs on this rank's parts of its parameters, whose gradients reach the DTensors."""

    ranks: Ranks
    gradients: Placement | None  # placement of the parameters' gradients; None means that of the parameters

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own: dict[str, Any] = self._parameters
        split = {name: value for name, value in own.items() if isinstance(value, DTensor)}
        gradients = None if self.gradients is None else [self.gradients]
        try:
            for name, parameter in split.items():
                own[name] = parameter.to_local(grad_placements=gradients)
            return super().__call__(*args, **kwargs)
        finally:
            own.update(split)


class SplitByInputs(LocalParameters):
    """Mixin over a linear layer that holds the weights of a part of its inputs."""

    def __call__(self, hidden: Tensor) -> Any:
        if not self.ranks.on:
            return super().__call__(hidden)
        bias, self._parameters["bias"] = self._parameters["bias"], None  # so that only the sum gets it
        try:
            out = self.ranks.add_up(super().__call__(hidden))
        finally:
            self._parameters["bias"] = bias
        return out if bias is None else out + (bias.to_local() if isinstance(bias, DTensor) else bias)


class SplitInside(nn.Module):
    """Mixin over the attention or the MLP, which every rank enters with the whole hidden states [B, T, D]."""

    ranks: Ranks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.ranks.on and args:
            args = (self.ranks.spread(args[0]), *args[1:])
        elif self.ranks.on:
            kwargs["hidden_states"] = self.ranks.spread(kwargs["hidden_states"])
        return super().__call__(*args, **kwargs)


def split(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Split the blocks of a Llama-shaped causal LM over a one-dimensional mesh in place, before FSDP2 shards it.

    Sizes that the number of ranks does not divide, and modules that are not split here, are a ConfigError.
    """
    _check_sizes(model, mesh.size())
    ranks = Ranks(mesh)
    tied: dict[nn.Parameter, nn.Parameter] = {}
    for block in model.get_decoder().layers:
        _check_modules(model, block, mesh.size())
        for name, module in block.named_modules():
            leaf = name.rpartition(".")[2]
            if leaf in _BY_OUTPUTS:
                _distribute(module, LocalParameters, ranks, {"weight": Shard(0), "bias": Shard(0)}, tied)
            elif leaf in _BY_INPUTS:
                _distribute(module, SplitByInputs, ranks, {"weight": Shard(1), "bias": Replicate()}, tied)
            elif leaf in _OF_ONE_HEAD:
                _distribute(module, LocalParameters, ranks, {}, tied, gradients=Partial())
        for parent in (block.self_attn, block.mlp):
            _swap(parent, SplitInside, ranks)
    for module in model.modules():
        if not isinstance(module, LocalParameters) and any(True for _ in module.parameters(recurse=False)):
            _distribute(module, LocalParameters, ranks, {}, tied)


def _check_sizes(model: PreTrainedModel, size: int) -> None:
    config = model.config.get_text_config()
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    sizes = {name: getattr(config, name, None) or config.num_attention_heads for name in names}
    if any(value % size for value in sizes.values()):
        told = ", ".join(f"{name} {value}" for name, value in sizes.items())
        raise ConfigError(_FIELD, got=size, allowed=f"a divisor of the model's {told}")


def _check_modules(model: PreTrainedModel, block: nn.Module, size: int) -> None:
    head_dim = getattr(block.self_attn, "head_dim", None) if hasattr(block, "self_attn") else None
    for name, module in block.named_modules():
        parent, _, leaf = name.rpartition(".")
        parameters = list(module.parameters(recurse=False))
        fits = (
            not parameters
            or (leaf in _BY_OUTPUTS | _BY_INPUTS and parent in ("self_attn", "mlp") and type(module) is nn.Linear)
            or (leaf in _OF_ONE_HEAD and [tuple(parameter.shape) for parameter in parameters] == [(head_dim,)])
            or (parent == "" and isinstance(parameters[0], nn.Parameter) and parameters[0].dim() == 1)  # a norm
        )
        if not fits:
            allowed = f"1 for {model.config.model_type}"
            fix = f"its {name} ({type(module).__name__}) is not split"
            raise ConfigError(_FIELD, got=size, allowed=allowed, fix=fix)


def _distribute(
    module: nn.Module,
    mixin: type[LocalParameters],
    ranks: Ranks,
    placements: dict[str, Placement],
    tied: dict[nn.Parameter, nn.Parameter],
    *,
    gradients: Placement | None = None,
) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter not in tied:
            placement = placements.get(name, Replicate())
            whole = distribute_tensor(parameter.detach(), ranks.mesh, [placement], src_data_rank=None)
            tied[parameter] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
        setattr(module, name, tied[parameter])
    _swap(module, mixin, ranks)
    module.gradients = gradients  # type: ignore[assignment]


def _swap(module: nn.Module, mixin: type[nn.Module], ranks: Ranks) -> None:
    swap_class(module, mixin)
    module.ranks = ranks  # type: ignore[assignment]
