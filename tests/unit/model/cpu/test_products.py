"""Which way round a product is taken is a rule on shapes, and both ways agree."""

import pytest
import torch
import torch.nn.functional as F

from app.model.cpu import products
from app.model.cpu.products import Product, swapped_product


@pytest.mark.parametrize("positions", [1, 2, 5])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_other_way_round_gives_the_same_product(positions: int, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(48, 32, generator=generator), torch.randn(1, positions, 32, generator=generator)
    bias = torch.randn(48, generator=generator) if with_bias else None
    torch.testing.assert_close(swapped_product(inputs, weight, bias), F.linear(inputs, weight, bias))


@pytest.mark.parametrize(
    ("shape", "dtype", "positions", "swapped"),
    [
        ((1024, 512), torch.float32, 1, True),
        ((1024, 512), torch.float32, 4, True),
        ((1024, 512), torch.float32, 5, False),
        ((512, 1024), torch.float32, 2, False),
        ((512, 256), torch.float32, 2, False),
        ((1024, 512), torch.bfloat16, 2, False),
    ],
)
def test_few_positions_of_large_wide_float32_weights_are_swapped(
    shape: tuple[int, int], dtype: torch.dtype, positions: int, swapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(products, "swapped_product", lambda inputs, *_: taken.append(1) or inputs)
    Product(torch.zeros(shape, dtype=dtype), None)(torch.zeros(1, positions, shape[1], dtype=dtype))
    assert bool(taken) == swapped
