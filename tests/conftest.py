import gc
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# An absent model might be one of the hub's, and asking it takes a machine without a network 20 seconds.
os.environ["HF_HUB_OFFLINE"] = "1"

# Examples of a busy machine take any time; the same at each run, so that a red one can be looked at.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


def pytest_collection_finish() -> None:
    """Leave what the imports made out of garbage collection, whose every full pass looked at 600,000 objects.

    And fill memory that nobody has written to with NaN, as it may be on any machine: who reads it fails here, too.
    """
    gc.collect()
    gc.freeze()
    torch.set_num_threads(1)  # tiny products gain nothing from threads, which wait for one another on a busy machine
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills it (torch.utils.deterministic)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Whatever an earlier test chose."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_ranks_are_left() -> Iterator[None]:
    """What follows a test that leaves its process group behind would run as a rank of it, and wait for the others."""
    yield
    assert not torch.distributed.is_initialized()
