"""The memory that this process holds. Tested by tests/unit/export/test_directory.py and tests/contract/test_data.py."""

import ctypes
import resource
import sys


def give_back_freed() -> None:
    """Make glibc return freed pages, which otherwise count as this process's as long as a neighbour is in use."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # other C libraries have none, and need none
        trim(0)


def peak_memory() -> int:
    """Return the most bytes that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak if sys.platform == "darwin" else 2**10 * peak
