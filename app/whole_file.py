"""Files that are written whole or not at all: a full disk, or an end in the middle, costs nobody the file before."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write `content`, text as UTF-8, beside `path` and put it in place once it is on the disk.

    A link stays and its target is replaced, with the mode it had; into a pipe or a device it is written as it is.

    Raises:
        OSError: It cannot be written; what stood there stands, and nothing is left beside it.
    """
    path, data = path.resolve(), content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    partial = path.with_name(f".{path.name}.partial")  # a rename needs the same disk
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, partial)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
