"""What tests on several ranks look at: whole weights, and how often ranks communicate."""

from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode


class Collectives(TorchDispatchMode):
    """Counts the collectives issued inside its `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.namespace in ("c10d", "_c10d_functional") and "wait" not in function.__name__
        return function(*args, **(kwargs or {}))


def is_sharded(parameter: torch.Tensor) -> bool:
    return isinstance(parameter, DTensor)


def whole_weights(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Every parameter by name, gathered where it is sharded; all ranks ask together."""
    return {
        name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().float().numpy().copy()
        for name, parameter in module.named_parameters()
    }
