"""Gives an object's class a mixin, as FSDP2 does. Tested by tests/unit/model/test_early_exit.py."""

from torch import nn

_MIXED: dict[tuple[type, type], type] = {}


def swap_class(module: nn.Module, mixin: type) -> None:
    """Turn the module into an instance of a class made of `mixin` and its class, in place."""
    base = type(module)
    if (mixin, base) not in _MIXED:
        _MIXED[mixin, base] = type(f"{mixin.__name__}{base.__name__}", (mixin, base), {"__module__": base.__module__})
    module.__class__ = _MIXED[mixin, base]
