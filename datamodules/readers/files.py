"""Which files a source has: names and sizes, nothing else."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pyarrow as pa
from pathspec import GitIgnoreSpec

from app.errors import DataError
from datamodules.readers.sources import Source

_log = logging.getLogger(__name__)

TOPICS = "pydoc_data/topics.py"
_LIBRARY_EXCLUDES = (
    *("site-packages/", "dist-packages/", "test/", "tests/", "idle_test/", "__pycache__/", "/pydoc_data/*"),
)

_SAMPLED_FILES, _SAMPLED_BLOCKS = 1000, 3000  # of a source at most
_BLOCKS_A_FILE, _BLOCK_BYTES = 64, 4096


class FileList:
    """Names (relative to `root`, sorted by their bytes) and sizes; about 60 bytes a file, whatever their number.

    Args:
        root: The folder.
        names: Relative names as bytes, sorted.
        sizes: `[num_files]` int64, in bytes.
    """

    def __init__(self, root: Path, names: pa.Array, sizes: np.ndarray) -> None:
        self.root, self.sizes = root, sizes
        self._names = names  # one buffer instead of a million strings, which forked workers would copy

    def __len__(self) -> int:
        return len(self.sizes)

    def name(self, file: int) -> str:
        """The name of a file, with "/" between folders."""
        return os.fsdecode(self._names[file].as_py())

    def path(self, file: int) -> Path:
        """Where a file is."""
        return self.root / self.name(file)

    def take(self, files: np.ndarray) -> FileList:
        """The list of the files with these indices."""
        return FileList(self.root, self._names.take(pa.array(files)), self.sizes[files])

    def digest_parts(self) -> Iterator[bytes]:
        """What a hash over names, sizes and a little of the content is taken of: a rewritten file may keep its size.

        A few blocks of at most a thousand files, spread over all of them, are read; no times of change, for a copy
        has others.
        """
        yield from (b"%b\0%d\0" % (name.as_py(), size) for name, size in zip(self._names, self.sizes, strict=True))
        for file in _spread(len(self), _SAMPLED_FILES):
            yield from self._sample(file, max(3, min(_SAMPLED_BLOCKS // len(self), _BLOCKS_A_FILE)))

    def _sample(self, file: int, num_blocks: int) -> Iterator[bytes]:
        """Blocks of a file from its beginning to its end; of one that cannot be read, that it cannot."""
        last = max(0, int(self.sizes[file]) - _BLOCK_BYTES)  # beginning of the last block
        try:
            with self.path(file).open("rb", buffering=0) as stream:
                for begin in sorted({last * number // (num_blocks - 1) for number in range(num_blocks)}):
                    stream.seek(begin)
                    yield stream.read(_BLOCK_BYTES)
        except OSError as error:  # whoever reads the file counts and logs it
            yield f"\0{error.errno}".encode()


def _spread(count: int, limit: int) -> Iterator[int]:
    """`limit` of the numbers below `count`, evenly spread, or all if they are fewer."""
    taken = min(count, limit)
    return (number * count // taken for number in range(taken))


def list_files(source: Source) -> FileList:
    """The files of a local source.

    Raises:
        DataError: The folder is missing, no file in it matches, or all that match are empty.
    """
    root, where = source.root, f"source {source.name!r}"
    if root.is_file():
        found = [(os.fsencode(root.name), root.stat().st_size)]
        root = root.parent
    elif root.is_dir():
        found = sorted(_walk(source))
    else:
        raise DataError(f"{where}: no folder or file {str(root)!r}; correct its path or create it")
    if not found:
        but = f" and is not excluded by {list(source.exclude)}" if source.exclude else ""
        raise DataError(f"{where}: no file in {str(root)!r} matches {source.pattern!r}{but}; correct its glob")
    sizes = np.array([size for _, size in found], dtype=np.int64)
    if not sizes.any():
        raise DataError(f"{where}: all {len(found)} files in {str(root)!r} are empty; give it files with text")
    return FileList(root, pa.array([name for name, _ in found], pa.large_binary()), sizes)


def _walk(source: Source) -> Iterator[tuple[bytes, int]]:
    library = source.kind in {"stdlib_code", "stdlib_text"}
    pattern = ("**/*.py" if library else source.pattern).split("/")
    exclude = [*_LIBRARY_EXCLUDES, *([f"!/{TOPICS}"] if source.kind == "stdlib_text" else [])]
    excluded = GitIgnoreSpec.from_lines(exclude if library else source.exclude).match_file
    folders: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]  # each with the folders it was entered through
    while folders:
        folder, entered = folders.pop()
        try:
            entries = os.scandir(source.root / folder)
            entered = (*entered, _identity((source.root / folder).stat()))
        except OSError as error:
            _log.warning("source %r: skipped folder %r: %s", source.name, folder, error.strerror)
            continue
        with entries:
            for entry in entries:
                name = folder + entry.name
                try:
                    if entry.is_dir():
                        if not excluded(name + "/") and _is_new(source, name, entry, entered):
                            folders.append((name + "/", entered))
                    elif _matches(name.split("/"), pattern) and not excluded(name):
                        size = entry.stat().st_size  # raises for a symbolic link to itself, or to nothing
                        if entry.is_file():
                            yield os.fsencode(name), size
                except OSError as error:
                    _log.warning("source %r: skipped %r: %s", source.name, name, error.strerror)


def _is_new(source: Source, name: str, entry: os.DirEntry[str], entered: tuple[tuple[int, int], ...]) -> bool:
    """Whether a folder is none of those it was reached through, as one behind a symbolic link may be."""
    if not entry.is_symlink() or _identity(entry.stat()) not in entered:
        return True
    _log.warning("source %r: skipped %r: a symbolic link to a folder that it lies in", source.name, name)
    return False


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _matches(names: list[str], patterns: list[str]) -> bool:
    """Whether a path matches a glob, both split at "/", as in `Path.glob`; `**` at the end means all files there."""
    if not patterns:
        return not names
    if patterns[0] == "**":
        return any(len(patterns) == 1 or _matches(names[at:], patterns[1:]) for at in range(len(names)))
    return bool(names) and fnmatchcase(names[0], patterns[0]) and _matches(names[1:], patterns[1:])
