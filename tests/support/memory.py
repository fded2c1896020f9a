"""Resident memory on Linux: what a process holds now, and its peak since then."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from app.model.mapped_memory import give_back_freed

Work = Callable[[], Any]


def process_status(field: str, process: Path = Path("/proc/self")) -> int:
    """A number of a process's status; memory is in KiB."""
    lines = (process / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def begin() -> int:
    """Bytes held now; the peak begins anew. What was freed is given back first: reused, it would hide what is added."""
    give_back_freed()
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * process_status("VmRSS")


def peak() -> int:
    """Most bytes held since `begin`."""
    return 1024 * process_status("VmHWM")


def peak_memory(prepare: Callable[..., Work], *args: Any, num_threads: int) -> int:
    """Bytes that a piece of work adds, at its peak, to what a new process holds before it.

    Args:
        prepare: Makes the work; what it allocates does not count. It is importable by name, as are `args`' classes.
        args: The arguments of `prepare`.
        num_threads: Threads of torch.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, prepare, args, num_threads).result()


def _measure(prepare: Callable[..., Work], args: tuple[Any, ...], num_threads: int) -> int:
    torch.set_num_threads(num_threads)
    work = prepare(*args)
    before = begin()
    work()
    return peak() - before
