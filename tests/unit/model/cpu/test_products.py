"""Which way round a product is taken is a rule on shapes, and both ways agree."""

import pytest
import torch
import torch.nn.functional as F

from app.model.cpu import products
from app.model.cpu.products import Product, in_fastest_layout, swapped_product


@pytest.mark.parametrize("positions", [1, 2, 5])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_other_way_round_gives_the_same_product(positions: int, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(48, 32, generator=generator), torch.randn(1, positions, 32, generator=generator)
    bias = torch.randn(48, generator=generator) if with_bias else None
    for laid_out in (inputs, inputs.transpose(1, 2).contiguous().transpose(1, 2)):
        product = swapped_product(laid_out, weight, bias)
        torch.testing.assert_close(product, F.linear(inputs, weight, bias))
        assert product.is_contiguous()  # the next product is slower with columns one after the other


@pytest.mark.parametrize(
    ("shape", "dtype", "positions", "threads", "swapped"),
    [
        ((1024, 512), torch.float32, 1, 1, True),
        ((512, 512), torch.float32, 4, 1, True),
        ((1024, 512), torch.float32, 6, 1, True),
        ((512, 1024), torch.float32, 6, 2, False),
        ((1024, 512), torch.float32, 7, 2, False),
        ((512, 1024), torch.float32, 3, 1, True),
        ((512, 1024), torch.float32, 4, 1, False),
        ((512, 1024), torch.float32, 4, 2, True),
        ((512, 2048), torch.float32, 1, 1, False),
        ((512, 2048), torch.float32, 1, 2, True),
        ((512, 2048), torch.float32, 2, 1, True),
        ((512, 256), torch.float32, 2, 2, False),
        ((1024, 512), torch.bfloat16, 2, 1, False),
    ],
)
def test_few_positions_of_large_float32_weights_are_swapped_where_that_is_faster(
    shape: tuple[int, int],
    dtype: torch.dtype,
    positions: int,
    threads: int,
    swapped: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(products, "swapped_product", lambda inputs, *_: taken.append(1) or inputs)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    product, inputs = Product(torch.zeros(shape, dtype=dtype), None), torch.zeros(1, positions, shape[1], dtype=dtype)
    product(inputs)
    assert bool(taken) == swapped
    product.often_read()(inputs)  # only larger weights leave the cache between two drafts
    assert len(taken) == swapped + (swapped and shape != (512, 512))


@pytest.mark.parametrize(
    ("shape", "dtype", "by_inputs"),
    [
        ((1024, 192), torch.float32, True),
        ((192, 1024), torch.float32, False),
        ((192, 192), torch.float32, False),
        ((192, 64), torch.float32, False),
        ((1024, 192), torch.bfloat16, False),
        ((1024, 256), torch.float32, False),
        ((1024,), torch.float32, False),
    ],
)
def test_small_float32_weights_of_many_outputs_are_laid_out_input_by_input(
    shape: tuple[int, ...], dtype: torch.dtype, by_inputs: bool
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    laid_out = in_fastest_layout(weight)
    assert torch.equal(laid_out, weight)
    assert laid_out.stride() == ((1, shape[0]) if by_inputs else weight.stride())
