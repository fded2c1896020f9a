"""Multiplies a few positions with a large float32 weight on a processor.

Decoding multiplies one to a few positions with every weight, and is bound by how fast a weight is read. For these
shapes (W x^T)^T reads the same memory as x W^T, mostly in less time. On an AMD EPYC with AVX-512, in one thread and for
weights of 576 to 2,048 inputs and outputs, `F.linear` took 1.1 to 2.0 times as long for two positions and 0.95 to 2.0
times for three. For one position it took 1.1 to 1.3 times as long up to 1,536 inputs, and 0.7 times beyond; for four to
six it took longer with 576 inputs, and less time with 1,024 and more. In two threads it took 1.2 to 2.2 times as long
for one to four positions. Rows are laid out one after the other for it: a pass of SmolLM2-135M over two positions
takes 1.7 times as long with the columns that a product before it would leave.

Shape legend: `T` positions (of all sequences), `I` input width, `O` output width.
"""

import math
from copy import copy
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from app.model.quantized import Quantization, QuantizedWeight

_LEAST_ELEMENTS = 2**18  # of a weight; smaller ones may stay in the processor's cache, where swapping is slower
_LEAST_OFTEN_READ = 2**19  # of a weight that is read so often that it stays there
_FEWEST_INPUTS = 128  # of a weight that is faster input by input
# Positions -> most inputs of a weight with which one thread is faster this way. With more positions none is.
_MOST_INPUTS = {1: 1536, 2: math.inf, 3: math.inf, 4: 768, 5: 768, 6: 768}
_FASTER_IN_THREADS = (1, 4)  # positions with which two threads are faster whatever the inputs are


def in_fastest_layout(weight: Tensor) -> Tensor:
    """The same values of a weight [O, I], or bias [O], in the order in memory that few positions read fastest.

    A small weight with more outputs than inputs is laid out input by input. From memory, `F.linear` then takes 0.5 to
    0.9 times as long for one to eleven positions, and 0.7 to 1.2 times from the processor's cache (192 inputs, 576 and
    1,024 outputs, one thread). With 64 inputs it took 1.6 times as long for one position from memory.
    """
    small = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() < _LEAST_ELEMENTS
    by_inputs = small and weight.dim() == 2 and _FEWEST_INPUTS <= weight.shape[1] < weight.shape[0]
    return weight.t().contiguous().t() if by_inputs else weight


class Product:
    """x -> x W^T + b for one weight [O, I] and bias [O] or None; shapes, dtype and device decide which way is taken.

    With a `quantization`, to which the weight has been rounded, few positions take a copy of it in fewer bits.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, quantization: Quantization = "none") -> None:
        self.weight, self.bias = weight, bias
        self._quantized = None if quantization == "none" else QuantizedWeight(weight.detach(), quantization)
        self._large = weight.numel() >= _LEAST_ELEMENTS

    def often_read(self) -> Self:
        """The same product with a weight that is read again and again, as that of a head by drafts."""
        product = copy(self)
        product._large = self.weight.numel() >= _LEAST_OFTEN_READ
        return product

    def __call__(self, inputs: Tensor) -> Tensor:
        """[B, T, I] -> [B, T, O]."""
        if self._quantized is not None and self._quantized.takes(inputs):
            outputs = self._quantized(inputs)
            return outputs if self.bias is None else outputs + self.bias
        if self._large and inputs.device.type == "cpu" and inputs.dtype == torch.float32:
            positions = inputs.shape[0] * inputs.shape[1]
            in_threads = positions in _FASTER_IN_THREADS and torch.get_num_threads() > 1
            if in_threads or inputs.shape[2] <= _MOST_INPUTS.get(positions, 0):
                return swapped_product(inputs, self.weight, self.bias)
        return F.linear(inputs, self.weight, self.bias)


def swapped_product(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(W x^T)^T + b. A single position is doubled, since the matrix-vector kernels are the slow ones."""
    flat_TI = inputs.reshape(-1, inputs.shape[-1]).contiguous()
    outputs_OT = torch.mm(weight, (flat_TI if len(flat_TI) > 1 else flat_TI.repeat(2, 1)).t())
    outputs_TO = outputs_OT.t()[: len(flat_TI)].contiguous()
    if bias is not None:
        outputs_TO = outputs_TO + bias
    return outputs_TO.reshape(*inputs.shape[:-1], -1)
