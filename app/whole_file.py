"""Files that are written whole or not at all: a full disk, or an end in the middle, costs nobody the file before."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write `content`, text as UTF-8, beside `path` and put it in place once it is on the disk.

    Raises:
        OSError: It cannot be written; what stood there stands, and nothing is left beside it.
    """
    partial = path.with_name(f".{path.name}.partial")  # a rename needs the same disk
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
