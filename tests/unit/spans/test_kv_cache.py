import pytest
import torch

from app.errors import ConfigError
from app.spans.kv_cache import KeyValueCache
from app.spans.static_cache import StaticCache


def _rows(first: int, stop: int) -> torch.Tensor:
    """[B=1, H=2, T, K=3], every element its position."""
    return torch.arange(first, stop, dtype=torch.float32)[None, None, :, None].expand(1, 2, -1, 3)


def _filled(num_layers: int, capacity: int, length: int) -> KeyValueCache:
    cache = KeyValueCache(num_layers=num_layers, capacity=capacity)
    for layer_idx in range(num_layers):
        cache.update(_rows(0, length), -_rows(0, length), layer_idx)
    return cache


def test_update_returns_everything_stored_so_far_as_views_of_one_store() -> None:
    cache = _filled(2, 8, 3)
    keys, values = cache.update(_rows(3, 5), -_rows(3, 5), 1)
    assert torch.equal(keys, _rows(0, 5))
    assert torch.equal(values, -_rows(0, 5))
    again, _ = cache.update(_rows(5, 6), -_rows(5, 6), 1)
    assert again.data_ptr() == keys.data_ptr()


def test_blocks_fill_independently_and_truncate_never_lengthens() -> None:
    cache = _filled(3, 8, 2)
    cache.update(_rows(2, 6), _rows(2, 6), 0)
    assert [cache.lengths(i) for i in range(3)] == [(6,), (2,), (2,)]
    cache.truncate([4])
    assert [cache.lengths(i) for i in range(3)] == [(4,), (2,), (2,)]


def test_a_full_store_grows_and_keeps_what_every_block_holds() -> None:
    cache = _filled(2, 4, 4)
    keys, values = cache.update(_rows(4, 9), -_rows(4, 9), 0)
    assert torch.equal(keys, _rows(0, 9))
    keys, values = cache.update(_rows(4, 5), -_rows(4, 5), 1)
    assert torch.equal(keys, _rows(0, 5))
    assert torch.equal(values, -_rows(0, 5))


def test_a_truncated_cache_goes_on_like_a_fresh_one() -> None:
    used, fresh = _filled(1, 8, 7), _filled(1, 8, 3)
    used.truncate([3])
    ours, theirs = (cache.update(_rows(20, 22), _rows(30, 32), 0) for cache in (used, fresh))
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


def test_truncating_to_nothing_leaves_an_empty_cache_and_negative_is_refused() -> None:
    cache = _filled(2, 4, 3)
    cache.truncate([0])
    assert cache.lengths(1) == (0,)
    with pytest.raises(ConfigError, match="length: got -1"):
        cache.truncate([-1])


def test_rows_of_different_lengths_are_written_where_each_ends_and_can_leave() -> None:
    cache = KeyValueCache(num_layers=2, batch_size=3, capacity=4)
    for layer_idx in (0, 1):
        cache.update(_rows(0, 4).expand(3, -1, -1, -1), -_rows(0, 4).expand(3, -1, -1, -1), layer_idx)
    cache.truncate([4, 1, 2])
    new = torch.stack([_rows(4, 6)[0], _rows(1, 3)[0], _rows(2, 4)[0]])
    keys, values = cache.update(new, -new, 1)  # grows, too
    assert (cache.lengths(0), cache.lengths(1)) == ((4, 1, 2), (6, 3, 4))
    assert keys.shape[2] == 6
    for row, length in enumerate(cache.lengths(1)):
        assert torch.equal(keys[row, :, :length], _rows(0, length)[0])
        assert torch.equal(values[row, :, :length], -_rows(0, length)[0])
    cache.keep_rows([2, 0])
    assert (cache.lengths(0), cache.lengths(1)) == ((2, 4), (4, 6))
    keys, _ = cache.update(torch.stack([_rows(4, 5)[0], _rows(6, 7)[0]]), torch.zeros(2, 2, 1, 3), 1)
    assert torch.equal(keys[0, :, :5], _rows(0, 5)[0])
    assert torch.equal(keys[1, :, :7], _rows(0, 7)[0])


def test_rows_made_of_one_hold_no_memory_that_was_never_written() -> None:
    """Such memory is NaN in all tests, and masks do not hide a NaN: 0 * NaN is NaN."""
    cache = _filled(1, 8, 2)
    cache.keep_rows([0, 0])
    new = _rows(2, 4).expand(2, -1, -1, -1)
    cache.update(new, new, 0)
    cache.truncate([4, 3])
    keys, values = cache.update(new, new, 0)
    assert keys.isfinite().all()
    assert values.isfinite().all()


def test_a_store_that_memory_cannot_hold_is_told_with_its_engine_and_size() -> None:
    new_BTHK, most = torch.zeros(2, 3, 1, 4), 10**14
    with pytest.raises(ConfigError, match=f"engine: got 'dynamic with room for 2 x {most} positions'"):
        KeyValueCache(num_layers=1, batch_size=2, capacity=most).append(new_BTHK, new_BTHK, 0)
    static = StaticCache(num_layers=1, batch_size=2, capacity=4, device=torch.device("cpu"))
    static.append(new_BTHK, new_BTHK, 0)
    with pytest.raises(ConfigError, match=f"engine: got 'static with room for 2 x {most} positions'"):
        static.grow(most)
