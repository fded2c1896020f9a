"""Compiles the arithmetic of each block, and leaves the choice of samples that enter it outside."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import maybe_mark_dynamic
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from app.errors import ConfigError
from app.model.early_exit import DroppableBlock
from app.model.tensor_parallel import SplitInside


def compile_blocks(model: PreTrainedModel, *, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the blocks of an `EarlyExitModel` at their first use in training; ConfigError if they are split.

    One compilation serves all blocks, since they are alike, and all masks that keep several samples, since the number
    of samples is symbolic. A compiled whole model would need new code for each pattern of skipped blocks.
    """
    for block in model.get_decoder().layers:
        assert isinstance(block, DroppableBlock)
        if any(isinstance(module, SplitInside) for module in block.modules()):
            raise ConfigError("compile_blocks", got=True, allowed="false with tensor_parallel_size > 1")
        plain = super(DroppableBlock, block).forward
        block.compiled = _for_any_batch(torch.compile(plain, fullgraph=True, backend=backend))


def _for_any_batch(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make only the number of samples symbolic: with `dynamic=True` a compilation takes minutes."""

    def call(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for value in tree_leaves((hidden_states, args, kwargs)):
            if isinstance(value, Tensor) and value.dim() > 1 and len(value) == len(hidden_states):
                maybe_mark_dynamic(value, 0)
        return run(hidden_states, *args, **kwargs)

    return call
