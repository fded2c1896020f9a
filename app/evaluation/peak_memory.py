"""Peak resident memory of a piece of work, in a process of its own: no memory freed before hides any there."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

Work = Callable[[], Any]


def peak_memory(prepare: Callable[..., Work], *args: Any, num_threads: int) -> int:
    """Bytes that a piece of work adds, at its peak, to what the process holds before it.

    Args:
        prepare: Makes the work; what it allocates does not count. Importable by name, as are `args`' classes.
        args: For it.
        num_threads: Of torch.

    Raises:
        OSError: Where the kernel does not tell (anything but Linux).
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, prepare, args, num_threads).result()


def _measure(prepare: Callable[..., Work], args: tuple[Any, ...], num_threads: int) -> int:
    torch.set_num_threads(num_threads)
    work = prepare(*args)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew at what is resident now
    before = process_status("VmRSS")
    work()
    return 1024 * (process_status("VmHWM") - before)


def process_status(field: str, process: Path = Path("/proc/self")) -> int:
    """A number of a process's status on Linux; memory is in KiB."""
    lines = (process / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
