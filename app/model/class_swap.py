"""Subclasses made of a mixin and the class of an object, which then becomes one of them, as FSDP2 does it."""

from __future__ import annotations

from torch import nn

_MIXED: dict[tuple[type, type], type] = {}


def swap_class(module: nn.Module, mixin: type) -> None:
    """Put a mixin before the class of a module, in place; modules of one class get one class."""
    base = type(module)
    if (mixin, base) not in _MIXED:
        _MIXED[mixin, base] = type(f"{mixin.__name__}{base.__name__}", (mixin, base), {"__module__": base.__module__})
    module.__class__ = _MIXED[mixin, base]
