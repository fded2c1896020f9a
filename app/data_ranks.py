"""The data-parallel ranks, which read rows of their own. Tested by tests/unit/training/test_token_mean.py."""

from typing import Any, NamedTuple


class DataRanks(NamedTuple):
    """The data-parallel rank of a process, the same on tensor-parallel ranks, and the number of such ranks."""

    rank: int
    num_replicas: int


def data_ranks(trainer: Any) -> DataRanks:
    """The data-parallel rank of the process in which a Lightning trainer runs."""
    settings = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
    return DataRanks(settings["rank"], settings["num_replicas"])
