"""Multiplies with weights that are stored in 8 or 4 bits: decoding reads a half or a quarter as much.

The kernels are torch's own. Those of a CUDA device were written for by torch's source and have not been run yet, so
that `check_kernel` looks at a product of theirs before a model is rounded. On a processor, torchao 0.18 has the kernel
of 4 bits as a prototype around the same one, and multiplies 8 bits as bfloat16 made of them, which is slower than a
weight that is bfloat16 already. All products of a token of SmolLM2-135M in bfloat16, one thread of an AMD EPYC with
AVX-512, medians: 37.9 ms, 20.8 in 8 bits and 9.0 in 4; over three positions 38.7, 28.5 and 13.1. In float32 they are
slow, and only for tests.

Shape legend: `N` positions (of all sequences), `I` input width, `O` output width, `G` groups of a row's weights.
Tested by tests/unit/model/test_quantized.py.
"""

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.errors import ConfigError, shortened

Quantization = Literal["none", "int8", "int4"]
QUANTIZATIONS: tuple[Quantization, ...] = ("none", "int8", "int4")
GROUP = 32  # weights that share a scale in 4 bits
_MOST_POSITIONS = {"int8": 4, "int4": 16}  # up to which the kernels are faster than products in bfloat16
_OUTPUTS_OF = 64  # the kernel of 4 bits takes so many outputs at a time, that of a CUDA device takes 8
_MOST_WRONG = 0.5  # of products that are around 8 and rounded to bfloat16
_TILES, _TILE = (8, 4, 2), 16  # groups of inputs that the kernel of 4 bits on a CUDA device can take at a time
_INPUTS_OF = 16  # the kernel of 8 bits takes so many inputs at a time, and reads beyond the last ones of other widths

Multiply = Callable[[Tensor], Tensor]  # x [N, I] -> x W^T [N, O]


class _Packed(NamedTuple):
    """How a weight is stored.

    Attributes:
        rounded_OI: The values that its integers stand for, in the weight's own type.
        multiply: The product with them.
    """

    rounded_OI: Tensor
    multiply: Multiply


def in_8_bits(weight_OI: Tensor) -> _Packed:
    """Give each output a scale, and weights from -127 to 127."""
    scale_O = (weight_OI.float().abs().amax(1) / 127).clamp(min=1e-12).to(weight_OI.dtype)
    integers_OI = (weight_OI.float() / scale_O.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    rounded_OI = (integers_OI.float() * scale_O.float()[:, None]).to(weight_OI.dtype)
    spare = -weight_OI.shape[1] % _INPUTS_OF
    padded_OI = F.pad(integers_OI, (0, spare)) if spare else integers_OI

    def multiply(inputs_NI: Tensor) -> Tensor:
        padded_NI = F.pad(inputs_NI, (0, spare)) if spare else inputs_NI
        product: Tensor = torch.ops.aten._weight_int8pack_mm(padded_NI, padded_OI, scale_O)
        return product

    return _Packed(rounded_OI, multiply)


def in_4_bits(weight_OI: Tensor) -> _Packed:
    """Give each GROUP of a row's weights a scale and a middle, and weights from 0 to 15.

    Raises:
        ConfigError: The rows are not made up of whole groups.
    """
    outputs, inputs = weight_OI.shape
    if inputs % GROUP:
        fix = "take int8"
        raise ConfigError("quantization", got=f"int4 of rows of {inputs}", allowed=f"multiples of {GROUP}", fix=fix)
    padded_OI = F.pad(weight_OI.float(), (0, 0, 0, -outputs % _OUTPUTS_OF))
    groups_OGW = padded_OI.view(len(padded_OI), -1, GROUP)
    low_OG, high_OG = groups_OGW.amin(-1), groups_OGW.amax(-1)
    scale_OG = ((high_OG - low_OG) / 15).clamp(min=1e-12).to(weight_OI.dtype)
    middle_OG = (low_OG + 8 * scale_OG.float()).to(weight_OI.dtype)
    scale_OG1, middle_OG1 = scale_OG.float()[..., None], middle_OG.float()[..., None]
    integers_OGW = (((groups_OGW - middle_OG1) / scale_OG1).round() + 8).clamp(0, 15)
    rounded_OI = ((integers_OGW - 8) * scale_OG1 + middle_OG1).flatten(1)[:outputs].to(weight_OI.dtype)
    scale_and_middle_GO2 = torch.stack((scale_OG, middle_OG), dim=-1).transpose(0, 1).contiguous()
    packed, product = _PACK_4_BITS[weight_OI.device.type](integers_OGW.to(torch.int32).flatten(1))

    def multiply(inputs_NI: Tensor) -> Tensor:
        found: Tensor = product(inputs_NI, packed, GROUP, scale_and_middle_GO2)
        return found[:, :outputs]

    return _Packed(rounded_OI, multiply)


def _for_cpu(integers_OI: Tensor) -> tuple[Tensor, Callable[..., Tensor]]:
    """Integers from 0 to 15 as the kernel takes them, and the kernel."""
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers_OI, 1)
    return packed, torch.ops.aten._weight_int4pack_mm_for_cpu


def _for_cuda(integers_OI: Tensor) -> tuple[Tensor, Callable[..., Tensor]]:
    """Do the same for a CUDA device. A byte has two integers of a row, the first of them in its upper half."""
    bytes_OI = integers_OI.to(torch.uint8)
    pairs_OI = bytes_OI[:, ::2] << 4 | bytes_OI[:, 1::2]
    tiles = next(each for each in _TILES if integers_OI.shape[1] % (each * _TILE) == 0)
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs_OI, tiles)
    return packed, torch.ops.aten._weight_int4pack_mm


_PACK_4_BITS = {"cpu": _for_cpu, "cuda": _for_cuda}
_PACK: dict[Quantization, Callable[[Tensor], _Packed]] = {"int8": in_8_bits, "int4": in_4_bits}


def check_kernel(quantization: Quantization, device: torch.device) -> None:
    """Multiply once in bfloat16, since nobody may have run torch's kernel on a device like this one.

    Raises:
        ConfigError: There is no kernel, or its product is another than that with the rounded weights.
    """
    generator = torch.Generator().manual_seed(0)
    weight_OI, inputs_NI = (torch.randn(64, 64, generator=generator).to(device, torch.bfloat16) for _ in range(2))
    try:
        rounded_OI, multiply = _PACK[quantization](weight_OI)
        found_NO = multiply(inputs_NI[:4])
        wrong = (found_NO.float() - inputs_NI[:4].float() @ rounded_OI.float().T).abs().max().item()
        said = f"torch's kernel is off by {wrong:.3g} here" if not wrong < _MOST_WRONG else ""
    except RuntimeError as error:
        said = f"torch's kernel does not run here: {shortened(error)}"
    if said:
        raise ConfigError(
            "quantization", got=f"{quantization} on {device.type}", allowed="none, or device cpu", fix=said
        )


class QuantizedWeight:
    """A weight [O, I] in few bits, for products of few positions; with more, its rounded values are faster."""

    def __init__(self, weight_OI: Tensor, quantization: Quantization) -> None:
        self._multiply = _PACK[quantization](weight_OI).multiply
        self._most = _MOST_POSITIONS[quantization]

    def takes(self, inputs: Tensor) -> bool:
        """Whether these inputs [..., I] are of few positions."""
        return inputs.numel() <= self._most * inputs.shape[-1]

    def __call__(self, inputs: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return self._multiply(inputs.reshape(-1, inputs.shape[-1]).contiguous()).reshape(*inputs.shape[:-1], -1)


@torch.no_grad()
def round_weights(modules: Iterable[nn.Module], quantization: Quantization) -> None:
    """Round the weights of all linear layers to values that `quantization` can store; tied embeddings follow."""
    weights = {layer.weight for module in modules for layer in module.modules() if isinstance(layer, nn.Linear)}
    for weight in weights:
        weight.copy_(_PACK[quantization](weight).rounded_OI)
