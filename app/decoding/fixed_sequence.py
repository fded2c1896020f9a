"""Runs the same kernels again and again: as they are, compiled, and as a graph on a CUDA device.

Tested by tests/unit/decoding/test_static_rounds.py.
"""

import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch

from app.errors import ConfigError

_COMPILERS = ("g++", "clang++", "c++")  # any of which inductor takes on a processor


class FixedSequence:
    """Runs a function without arguments, which does the same to the same memory at each call.

    On a CUDA device the first call runs the function itself, since libraries set themselves up then. A compiled
    function runs once more, since its first call may change what it looks at, so that torch compiles it again. The next
    call records a graph, which that call and all later ones replay: the host starts one graph instead of each kernel.
    On other devices every call runs the function. Inductor's own graphs (mode reduce-overhead) are not used: they leave
    out what writes to its inputs, as a round does to keys and values.
    """

    def __init__(self, function: Callable[[], None], device: torch.device, *, compiled: bool = False) -> None:
        self._function = function
        if compiled:  # torch compiles eight versions of a function, and would count all sequences as one
            settings: dict[str, Any] = {"dynamic": False, "isolate_recompiles": True}  # torch's types lack one
            self._function = torch.compile(function, **settings)
        self._captures = device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls_before = 2 if compiled else 1

    def __call__(self) -> None:
        if self._captures and self._graph is None and not self._calls_before:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._function()
        if self._graph is None:
            self._function()
        else:
            self._graph.replay()
        self._calls_before = max(0, self._calls_before - 1)


def check_compiler(device: torch.device) -> None:
    """Raise ConfigError unless there is what inductor needs on this device: a C++ compiler on a CPU, or triton."""
    if device.type == "cuda":
        found, needed = importlib.util.find_spec("triton") is not None, "the package triton"
    else:
        names = (os.environ.get("CXX"), *_COMPILERS)
        found, needed = any(name and shutil.which(name) for name in names), f"a C++ compiler ({' | '.join(_COMPILERS)})"
    if not found:
        raise ConfigError("compile_rounds", got=True, allowed=f"false without {needed}")
