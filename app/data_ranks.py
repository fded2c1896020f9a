"""Ranks with rows of their own: all of them but for tensor parallelism, whose ranks share theirs."""

from __future__ import annotations

from typing import Any, NamedTuple


class DataRanks(NamedTuple):
    """Where a process stands among those.

    Attributes:
        rank: Its number; ranks that share rows have the same.
        size: How many there are.
    """

    rank: int
    size: int


def data_ranks(trainer: Any) -> DataRanks:
    """Of the process that a Lightning trainer runs in."""
    replicas = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
    return DataRanks(replicas["rank"], replicas["num_replicas"])
