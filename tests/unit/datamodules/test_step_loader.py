from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import numpy as np
import pytest
import torch

from datamodules.mixture import MixtureOrder
from datamodules.packing import PackedRows, pack_documents
from datamodules.step_loader import Placement, RowDataset, StepBatchSampler, StepLoader

NUM_ROWS = (40, 14)
Indices = list[tuple[int, int]]


def sampler(
    *, place: Placement, position: Callable[[], int] = lambda: 0, batch_size: int = 2, num_rows: int = sum(NUM_ROWS)
) -> StepBatchSampler:
    order = MixtureOrder(weights=[3, 1], num_rows=NUM_ROWS, seed=5)
    return StepBatchSampler(order=order, num_rows=num_rows, batch_size=batch_size, place=place, position=position)


def train(place: Placement, *, steps: int, first_step: int = 0) -> list[Indices]:
    """The batches of `steps` optimizer steps, iterated epoch after epoch as Lightning does."""
    step = first_step
    batches: list[Indices] = []
    loader = sampler(place=place, position=lambda: step * place.accumulate)
    while step < first_step + steps:
        for micro, batch in enumerate(loader):
            if step == first_step + steps:
                break
            batches.append(batch)
            step += (micro + 1) % place.accumulate == 0
    return batches


def test_epochs_are_whole_optimizer_steps_of_about_all_rows() -> None:
    assert len(sampler(place=Placement())) == 27
    assert len(sampler(place=Placement(accumulate=4))) == 24
    assert len(sampler(place=Placement(accumulate=4, world_size=2))) == 12
    assert len(sampler(place=Placement(accumulate=64))) == 64  # never less than one step
    assert len(list(sampler(place=Placement(accumulate=4)))) == 24


@pytest.mark.parametrize("first_step", [0, 1, 5, 11, 12, 13, 24, 25, 40])
def test_resuming_at_any_step_gives_what_an_uninterrupted_run_gives(first_step: int) -> None:
    place = Placement(accumulate=2)  # 13 steps an epoch
    uninterrupted = train(place, steps=50)
    assert train(place, steps=50 - first_step, first_step=first_step) == uninterrupted[2 * first_step :]


def test_the_first_iteration_after_resuming_ends_with_the_epoch() -> None:
    loader = sampler(place=Placement(accumulate=2), position=lambda: 10)
    assert len(list(loader)) == len(loader) - 10


def test_an_epoch_boundary_moves_nothing() -> None:
    order = MixtureOrder(weights=[3, 1], num_rows=NUM_ROWS, seed=5)
    stream = [order.row(n) for n in range(160)]
    assert [row for batch in train(Placement(accumulate=2), steps=40) for row in batch] == stream


def test_ranks_divide_the_stream() -> None:
    one = train(Placement(), steps=24)
    ranks = [train(Placement(rank=rank, world_size=2), steps=12) for rank in (0, 1)]
    assert [batch for pair in zip(*ranks, strict=True) for batch in pair] == one


@pytest.mark.parametrize(
    ("limit", "accumulate", "epoch_batches"),
    [(1.0, 1, 27), (5, 1, 5), (5, 2, 6), (0.5, 1, 13), (100, 1, 27), (1, 4, 4)],
)
def test_an_epoch_advances_by_the_trainers_limit_in_whole_steps(
    limit: int | float, accumulate: int, epoch_batches: int
) -> None:
    place = Placement(limit=limit, accumulate=accumulate)
    assert place.epoch_batches(27) == epoch_batches


def packed_sources() -> list[PackedRows]:
    rng = np.random.default_rng(0)
    return [
        pack_documents([rng.integers(1, 50, size=8 * rows - 1, dtype=np.int32)], seq_len=8, eos_id=0)
        for rows in NUM_ROWS
    ]


def test_a_row_is_a_dict_of_int64_tensors() -> None:
    sources = packed_sources()
    row = RowDataset(sources)[(1, 3)]
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in row.items()} == {
        "input_ids": (torch.int64, (8,)),
        "labels": (torch.int64, (8,)),
        "position_ids": (torch.int64, (8,)),
        "source": (torch.int64, ()),
    }
    assert row["input_ids"].tolist() == sources[1].input_ids[3].tolist()
    assert row["source"] == 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_position_is_asked_for_when_the_first_batch_is_wanted(num_workers: int) -> None:
    """Lightning may create the iterator before it restores the step."""
    step = 0
    batches = sampler(place=Placement(), position=lambda: step)
    loader = StepLoader(RowDataset(packed_sources()), batch_sampler=batches, num_workers=num_workers)
    iterator = iter(loader)
    step = 7
    first = next(iterator)
    expected = next(islice(sampler(place=Placement()), 7, None))
    assert first["source"].tolist() == [source for source, _ in expected]
    assert first["input_ids"].tolist() == [packed_sources()[source].input_ids[row].tolist() for source, row in expected]
