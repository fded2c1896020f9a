"""Returns freed memory to the system. Tested by the peaks in tests/unit/export/test_directory.py."""

import ctypes


def give_back_freed() -> None:
    """Make glibc return freed pages, which otherwise count as this process's as long as a neighbour is in use."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # other C libraries have none, and need none
        trim(0)
