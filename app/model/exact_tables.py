"""Keeps numbers exact when a model is converted to bfloat16: rotary frequencies, sums of losses.

A rounded frequency would turn far positions by whole radians, and a rounded sum would stop growing.
Tested by tests/distributed/test_precisions.py.
"""

from collections.abc import Callable

from torch import Tensor, nn

from app.model.class_swap import swap_class

Conversion = Callable[[Tensor], Tensor]  # what nn.Module._apply takes


def moving_only(fn: Conversion) -> Conversion:
    """A conversion that moves tensors to the device to which `fn` moves them, and keeps their dtype."""

    def move(tensor: Tensor) -> Tensor:
        return fn(tensor) if tensor.is_meta else tensor.to(fn(tensor.new_empty(0)).device)

    return move


class ExactTables(nn.Module):
    """Mixin over a module that has buffers and no parameters: its buffers can be moved, and keep their dtype."""

    def _apply(self, fn: Conversion, recurse: bool = True) -> nn.Module:
        super()._apply(moving_only(fn), recurse)  # type: ignore[no-untyped-call]
        return self


def keep_tables_exact(model: nn.Module) -> None:
    """Make every module that holds only buffers keep their dtype in `model.to(dtype)`."""
    for module in model.modules():
        tables, weights = (list(own(recurse=False)) for own in (module.buffers, module.parameters))
        if tables and not weights and not isinstance(module, ExactTables):
            swap_class(module, ExactTables)
