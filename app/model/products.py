"""Products of a few positions with a large weight, each the way round that is faster on this machine.

Decoding multiplies one to a few positions with every weight, and is bound by how fast a weight is read. `F.linear`
leaves the choice of a kernel to the BLAS library, and for few positions in float32 on a CPU that choice can be far
from the best: (W x^T)^T instead of x W^T reads the same memory and can take half of the time, or twice. So both are
timed once, on the model's own weights. The two differ in the last bits, as kernels for other numbers of threads do:
the same seed gives the same text in one process, and all but surely in another.

Shape legend: `T` positions (of all sequences), `I` input width, `O` output width.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

_TIMED = (1, 2, 4, 8)  # numbers of positions; those between are treated as the next larger one
_SWEEP_BYTES = 256 * 2**20  # of weights: more than caches hold, or the kernels would be timed on warm weights
_MIN_ELEMENTS = 2**15  # of a weight; smaller ones are bound by calls, not by memory
_GAIN = 0.95  # share of the time that the other way must stay below
_REPEATS = 3

_known: dict[object, list[frozenset[int]]] = {}


class Product:
    """x -> x W^T + b for one weight.

    Args:
        weight: W [O, I].
        bias: b [O], or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.swapped: frozenset[int] = frozenset()  # numbers of positions for which (W x^T)^T is faster

    def __call__(self, inputs: Tensor) -> Tensor:
        """[B, T, I] -> [B, T, O]."""
        if self.swapped and inputs.shape[0] * inputs.shape[1] in self.swapped:
            return swapped_product(inputs, self.weight, self.bias)
        return F.linear(inputs, self.weight, self.bias)


def swapped_product(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(W x^T)^T + b; one position is doubled, for matrix-vector kernels are what is to be avoided."""
    flat_TI = inputs.reshape(-1, inputs.shape[-1])
    outputs_TO = torch.mm(weight, (flat_TI if len(flat_TI) > 1 else flat_TI.repeat(2, 1)).t()).t()[: len(flat_TI)]
    if bias is not None:
        outputs_TO = outputs_TO + bias
    return outputs_TO.reshape(*inputs.shape[:-1], -1)


@torch.no_grad()
def choose_ways(layers: Sequence[Sequence[Product]]) -> None:
    """Time both ways on these weights and let each product use the faster one; once a process for the same shapes.

    Only float32 on a CPU is timed: elsewhere the plain way was never slower.

    Args:
        layers: The products of each layer, in the order and of the shapes that all layers share.
    """
    roles = layers[0]
    weight = roles[0].weight
    large = max(product.weight.numel() for product in roles) >= _MIN_ELEMENTS
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not large:
        return
    key = tuple(product.weight.shape for product in roles), len(layers), torch.get_num_threads()
    if key not in _known:
        _known[key] = _time(layers)
    for layer in layers:
        for product, swapped in zip(layer, _known[key], strict=True):
            product.swapped = swapped


def _time(layers: Sequence[Sequence[Product]]) -> list[frozenset[int]]:
    """For each product of a layer the numbers of positions at which the swapped way is faster."""
    layer_bytes = sum(product.weight.nbytes for product in layers[0])
    swept = layers[: max(1, _SWEEP_BYTES // layer_bytes)]
    faster: list[set[int]] = [set() for _ in layers[0]]
    smaller = 0
    for number in _TIMED:
        sweeps = [[_sweep(swept, number, swap=swap) for swap in (False, True)] for _ in range(_REPEATS)]  # alternating
        for role in range(len(layers[0])):
            plain, swapped = (median(sweep[way][role] for sweep in sweeps) for way in (0, 1))
            if swapped < _GAIN * plain:
                faster[role].update(range(smaller + 1, number + 1))
        smaller = number
    return [frozenset(numbers) for numbers in faster]


def _sweep(layers: Sequence[Sequence[Product]], number: int, *, swap: bool) -> list[float]:
    """Seconds spent on each role in one pass over the layers, as decoding would make it."""
    seconds = [0.0] * len(layers[0])
    for layer in layers:
        for role, product in enumerate(layer):
            inputs = product.weight.new_ones(1, number, product.weight.shape[1])
            started = perf_counter()
            if swap:
                swapped_product(inputs, product.weight, None)
            else:
                F.linear(inputs, product.weight)
            seconds[role] += perf_counter() - started
    return seconds
