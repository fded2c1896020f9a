"""Resident memory of this process: what it holds now, and its peak since then."""

from __future__ import annotations

import ctypes
from pathlib import Path

from app.evaluation.peak_memory import process_status


def begin() -> int:
    """Bytes held now; the peak begins anew. What was freed is given back first: reused, it would hide what is added."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * process_status("VmRSS")


def peak() -> int:
    """Most bytes held since `begin`."""
    return 1024 * process_status("VmHWM")
