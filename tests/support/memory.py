"""Memory of a process on Linux: what it holds, and the most that a piece of work adds."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch

from app.model.process_memory import give_back_freed

Work = Callable[[], Any]


def process_status(field: str, process: Path = Path("/proc/self")) -> int:
    """A number of a process's status; memory is in KiB."""
    lines = (process / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


class Peak:
    """The most bytes of anonymous memory that a block adds.

    Clean pages of mapped files do not count, since the system reclaims them wherever memory is short. The kernel keeps
    no peak of the others, so they are sampled.
    """

    def __enter__(self) -> "Peak":
        give_back_freed()  # freed memory that is used again would hide what is added
        self._before = self._most = process_status("RssAnon")
        self._over, self._sampling = Event(), Thread(target=self._sample)
        self._sampling.start()
        return self

    def _sample(self) -> None:
        while not self._over.wait(0.0005):
            self._most = max(self._most, process_status("RssAnon"))

    def __exit__(self, *raised: object) -> None:
        self._over.set()
        self._sampling.join()
        self.grown = 1024 * (max(self._most, process_status("RssAnon")) - self._before)


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
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew at what is resident now
    before = process_status("VmRSS")
    work()
    return 1024 * (process_status("VmHWM") - before)
