"""The text that git-lfs keeps instead of a large file. Tested by tests/unit/model_files/test_open.py."""

from pathlib import Path

POINTER = b"version https://git-lfs.github.com/spec/"
IS_POINTER = "a git-lfs pointer, not the file itself: run git lfs pull"


def is_pointer(path: Path) -> bool:
    """Whether a file holds only this text. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        return file.read(len(POINTER)) == POINTER
