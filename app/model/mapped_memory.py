"""Giving back memory that is not needed any more: mapped from a checkpoint file and copied elsewhere, or freed."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

_MADV_PAGEOUT = 21  # linux/mman.h; the mmap module does not name it
_MADV_DONTNEED = 4


def file_mappings() -> list[range]:
    """Addresses of this process that are mapped from files; none where the system does not tell."""
    maps = Path("/proc/self/maps")
    lines = [line.split(maxsplit=5) for line in maps.read_text().splitlines()] if maps.exists() else []
    return [range(*(int(address, 16) for address in line[0].split("-"))) for line in lines if line[4] != "0"]


def page_out(tensor: Tensor, mappings: Sequence[range], *, last_use: bool = False) -> None:
    """Tell the kernel that a tensor's memory, if mapped from a file, is no longer needed; it reads it again if it is.

    The mapping itself lives as long as any weight of the file does, and would count as the process's memory. Memory
    that is mapped from no file is left alone: it is freed with its tensor, and could only be swapped out. Nothing can
    be lost: this advice, unlike `last_use`, reclaims pages as a shortage of memory would. Clean ones are read from
    the file again; those written to, which belong to this process alone, go to swap or stay.

    Args:
        tensor: Any.
        mappings: From `file_mappings`, no older than the tensor.
        last_use: Nobody reads the tensor again. Then pages go that another process maps at this moment too, which the
            kernel otherwise leaves, with what was written to them.
    """
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if tensor.device.type == "cpu" and start < stop and any(start in m and stop <= m.stop for m in mappings):
        _advise(start, stop - start, _MADV_DONTNEED if last_use else _MADV_PAGEOUT)


def give_back_freed() -> None:
    """Tell glibc to give back what was freed: pieces between those in use would count as this process's for ever."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # other C libraries have none, and need none
        trim(0)


def _advise(start: int, length: int, advice: int) -> None:
    """Kernels before 5.4 refuse to page out, and nothing changes."""
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)
