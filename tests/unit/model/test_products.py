from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from app.model import products
from app.model.products import Product, choose_ways, swapped_product


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_known", {})


def _layers(count: int = 2, *, width: int = 256, dtype: torch.dtype = torch.float32) -> list[list[Product]]:
    generator = torch.Generator().manual_seed(0)
    return [
        [Product(torch.randn(out, width, generator=generator).to(dtype), None) for out in (width, 2 * width)]
        for _ in range(count)
    ]


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 1), (3, 4)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_both_ways_round_give_the_same_product(shape: tuple[int, int], with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, inputs = torch.randn(7, 5, generator=generator), torch.randn(*shape, 5, generator=generator)
    bias = torch.randn(7, generator=generator) if with_bias else None
    torch.testing.assert_close(swapped_product(inputs, weight, bias), F.linear(inputs, weight, bias))


def _clock(monkeypatch: pytest.MonkeyPatch, *, swapped_costs: dict[int, float]) -> None:
    """Time passes only in products: 1 second the plain way, `swapped_costs[positions]` the other."""
    now = [0.0]
    monkeypatch.setattr(products, "perf_counter", lambda: now[0])

    def plain(inputs: torch.Tensor, weight: torch.Tensor) -> None:
        now[0] += 1.0

    def swapped(inputs: torch.Tensor, weight: torch.Tensor, bias: None) -> None:
        now[0] += swapped_costs[inputs.shape[1]] * (weight.shape[0] / 256)  # the wider role gains less

    monkeypatch.setattr(products.F, "linear", plain)
    monkeypatch.setattr(products, "swapped_product", swapped)


def test_each_role_uses_the_way_that_was_faster_at_that_number_of_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = _layers()
    _clock(monkeypatch, swapped_costs={1: 1.2, 2: 0.4, 4: 0.6, 8: 0.97})
    choose_ways(layers)
    assert [sorted(product.swapped) for product in layers[0]] == [[2, 3, 4], [2]]
    assert [product.swapped for product in layers[1]] == [product.swapped for product in layers[0]]


def test_the_same_shapes_are_timed_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: Iterator[int] = iter([1])
    monkeypatch.setattr(products, "_time", lambda layers: [frozenset({next(timed)})] * 2)
    for _ in range(2):
        layers = _layers()
        choose_ways(layers)
        assert layers[1][0].swapped == {1}


@pytest.mark.parametrize("layers", [_layers(dtype=torch.bfloat16), _layers(width=64)], ids=["bfloat16", "small"])
def test_other_types_and_small_weights_are_not_timed(
    layers: list[list[Product]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_time", lambda _: pytest.fail("timed"))
    choose_ways(layers)
    assert not layers[0][0].swapped


def test_a_product_takes_the_chosen_way(monkeypatch: pytest.MonkeyPatch) -> None:
    product, taken = _layers()[0][0], list[int]()
    product.swapped = frozenset({2})
    monkeypatch.setattr(products, "swapped_product", lambda inputs, *_: taken.append(inputs.shape[1]) or inputs)
    for positions in (1, 2, 3):
        product(torch.ones(1, positions, 256))
    assert taken == [2]
