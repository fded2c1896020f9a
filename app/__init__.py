"""LayerSkip in PyTorch Lightning: train Llama models that can stop early, and decode them faster at no loss.

    from app import load

    model = load("runs/quickstart/checkpoints/last.ckpt")
    print(model.generate("def main(").text)

The names of `__all__` are the Python API. They are imported when they are asked for, so that `layerskip --help` does
not wait for torch. Tested by tests/unit/generation/test_model.py.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from app.generation.model import Model, load
    from app.generation.request import Generation
    from app.training.module import LayerSkipModule

__all__ = ["Generation", "LayerSkipModule", "Model", "load"]

_HOMES = {
    "Generation": "app.generation.request",
    "LayerSkipModule": "app.training.module",
    "Model": "app.generation.model",
    "load": "app.generation.model",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
