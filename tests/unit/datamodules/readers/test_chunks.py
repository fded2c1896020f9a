import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.readers.chunks import ByteRanges, Groups, stride

SIZES = st.lists(st.integers(0, 5000), min_size=1, max_size=40)


@settings(max_examples=30)
@given(sizes=SIZES, min_chunks=st.integers(1, 60))
def test_ranges_cover_every_byte_once_and_are_of_one_size(sizes: list[int], min_chunks: int) -> None:
    ranges = ByteRanges(np.array(sizes, np.int64), min_chunks=min_chunks)
    covered = [np.zeros(size, int) for size in sizes]
    lengths = []
    for chunk in range(ranges.num_chunks):
        pieces = list(ranges.ranges(chunk))
        assert all(0 <= piece.begin < piece.end <= sizes[piece.file] for piece in pieces)
        lengths.append(sum(piece.end - piece.begin for piece in pieces))
        for piece in pieces:
            covered[piece.file][piece.begin : piece.end] += 1
    assert all((count == 1).all() for count in covered)
    assert ranges.num_chunks == min(max(min_chunks, 1), sum(sizes))
    assert not lengths or max(lengths) - min(lengths) <= 1


@settings(max_examples=30)
@given(costs=st.lists(st.integers(1, 5_000_000), min_size=1, max_size=60), min_chunks=st.integers(1, 80))
def test_groups_hold_every_unit_once_and_none_is_empty(costs: list[int], min_chunks: int) -> None:
    groups = Groups(np.array(costs, np.int64), min_chunks=min_chunks)
    units = [groups.units(chunk) for chunk in range(groups.num_chunks)]
    assert sorted(unit for chunk in units for unit in chunk) == list(range(len(costs)))
    assert all(units)
    assert groups.num_chunks >= min(min_chunks, len(costs))


def test_groups_of_small_units_are_of_about_equal_size() -> None:
    costs = np.random.default_rng(0).integers(1000, 20_000, size=10_000)
    groups = Groups(costs, min_chunks=1)
    sizes = [costs[groups.units(chunk)].sum() for chunk in range(groups.num_chunks)]
    assert groups.num_chunks == -(-costs.sum() // 2**20)
    assert max(sizes) - min(sizes) <= 2 * 20_000


def test_a_chunk_of_small_files_mixes_folders() -> None:
    """Sorted by name, the first hundred files would be one folder's."""
    folders = np.repeat(np.arange(100), 100)
    groups = Groups(np.full(10_000, 10_000), min_chunks=1)
    assert len(set(folders[groups.units(0)])) > 50
    assert len(set(folders[: len(groups.units(0))])) <= 2


def test_the_order_of_files_is_always_the_same_and_not_that_of_their_names() -> None:
    sizes = np.full(100, 10)
    orders = [ByteRanges(sizes, min_chunks=1).order.tolist() for _ in range(2)]
    assert orders[0] == orders[1] != sorted(orders[0])


@pytest.mark.parametrize(
    ("total", "min_chunks", "expected"),
    [(2**30, 1, 1024), (2**40, 1, 100_000), (10_000, 16, 16), (3, 16, 3), (2**40, 200_000, 200_000)],
)
def test_a_chunk_is_about_a_mebibyte_unless_the_corpus_is_huge_or_tiny(
    total: int, min_chunks: int, expected: int
) -> None:
    assert ByteRanges(np.array([total]), min_chunks=min_chunks).num_chunks == expected


def test_no_file_at_all_is_no_chunk() -> None:
    nothing = np.zeros(0, np.int64)
    assert ByteRanges(nothing, min_chunks=3).num_chunks == 0
    assert Groups(nothing, min_chunks=3).num_chunks == 0
    assert stride(0, min_chunks=3, source="a", unit="file") == 1


def test_too_few_units_are_dealt_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert stride(8, min_chunks=8, source="notes", unit="shard") == 1
    assert not caplog.text
    assert stride(3, min_chunks=8, source="notes", unit="shard") == 3
    assert "source 'notes': 3 shard(s) for 8 lanes: each is read 3 times over" in caplog.text
