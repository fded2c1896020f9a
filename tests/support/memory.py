"""Resident memory of this process: what it holds now, and its peak since then."""

from __future__ import annotations

from pathlib import Path

from app.evaluation.peak_memory import process_status
from app.model.mapped_memory import give_back_freed


def begin() -> int:
    """Bytes held now; the peak begins anew. What was freed is given back first: reused, it would hide what is added."""
    give_back_freed()
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * process_status("VmRSS")


def peak() -> int:
    """Most bytes held since `begin`."""
    return 1024 * process_status("VmHWM")
