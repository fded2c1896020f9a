"""Attention for training in bfloat16 on a CPU, as two batched products.

PyTorch's kernel for CPUs never stores the scores, and pays for that with many small products in rows of a few hundred
tokens: a training step with two exits takes 1.5 times as long for TOPv2's small model (64 rows of 46 tokens) and 2.0
times as long for the quickstart's (8 rows of 128), and the same time for SmolLM2-135M (2 rows of 256). These are
medians of alternating pairs in one thread of an AMD EPYC with AVX-512. Scores are rounded to bfloat16 here, as in
transformers' "eager" attention, and the softmax is computed in float32. Processors that emulate bfloat16 train in
float32, for which PyTorch's kernel stays.

Shape legend: `B` rows, `H` heads, `T` tokens, `W` width of a head.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_MAX_LENGTH = 512  # scores of longer rows take more memory than the speed is worth; 0 switches this off


def fast_attention(run: Callable[..., Tensor], hidden_BTD: Tensor) -> Callable[..., Tensor]:
    """Wrap a training block's forward `run`, so that it attends by products where they are faster."""
    if hidden_BTD.device.type != "cpu" or hidden_BTD.shape[1] > _MAX_LENGTH:
        return run

    def attending(*args: Any, **kwargs: Any) -> Tensor:
        with _Products():
            return run(*args, **kwargs)

    return attending


class _Products(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or len(args) != 3 or kwargs.get("dropout_p"):
            return func(*args, **kwargs)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else args[0].dtype
        if dtype != torch.bfloat16 or type(args[0]) is not Tensor:
            return func(*args, **kwargs)  # DTensors, and fake ones in `layerskip plan`, take PyTorch's way
        settings = {name: value for name, value in kwargs.items() if name != "dropout_p"}
        with torch.autocast("cpu", enabled=False):
            return attend(*(tensor.to(dtype) for tensor in args), **settings)


def attend(
    query_BHTW: Tensor,
    key_BHTW: Tensor,
    value_BHTW: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute what torch's scaled_dot_product_attention does with these arguments, [B, H, T, W]."""
    if enable_gqa:
        groups = query_BHTW.shape[1] // key_BHTW.shape[1]
        key_BHTW, value_BHTW = (each.repeat_interleave(groups, dim=1) for each in (key_BHTW, value_BHTW))
    if is_causal:
        length = query_BHTW.shape[2]
        attn_mask = torch.ones(length, length, dtype=torch.bool, device=query_BHTW.device).tril()
    scaled = query_BHTW * (query_BHTW.shape[-1] ** -0.5 if scale is None else scale)
    scores_BHTT = scaled @ key_BHTW.transpose(-1, -2)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:  # adding a mask is faster than filling by it
            attn_mask = torch.zeros_like(attn_mask, dtype=scores_BHTT.dtype).masked_fill_(~attn_mask, -torch.inf)
        scores_BHTT.add_(attn_mask)
    return scores_BHTT.softmax(dim=-1) @ value_BHTW
