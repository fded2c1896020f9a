"""What git keeps in the place of a large file until `git lfs pull` fetches it."""

from __future__ import annotations

from pathlib import Path

POINTER = b"version https://git-lfs.github.com/spec/"
IS_POINTER = "a git-lfs pointer, not the file itself: run git lfs pull"


def is_pointer(path: Path) -> bool:
    """Whether the file at `path` is such a text. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        return file.read(len(POINTER)) == POINTER
