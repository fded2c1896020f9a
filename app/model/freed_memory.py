"""Giving freed memory back to the system."""

from __future__ import annotations

import ctypes


def give_back_freed() -> None:
    """Tell glibc to give back what was freed: pieces between those in use would count as this process's for ever."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # other C libraries have none, and need none
        trim(0)
