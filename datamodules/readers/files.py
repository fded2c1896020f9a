"""The files of a local source: their names and sizes, and samples of their content."""

import logging
import os
import stat
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
    """Names of files relative to `root`, as sorted bytes, and their `sizes` [num_files] in bytes, int64.

    It takes about 60 bytes a file, whatever their number.
    """

    def __init__(self, root: Path, names: pa.Array, sizes: np.ndarray) -> None:
        self.root, self.sizes = root, sizes
        self._names = names  # one buffer instead of a million strings, which forked workers would copy

    def __len__(self) -> int:
        return len(self.sizes)

    def name(self, file: int) -> str:
        """Return the relative name of a file, with "/" between folders."""
        return os.fsdecode(self._names[file].as_py())

    def path(self, file: int) -> Path:
        return self.root / self.name(file)

    def take(self, files: np.ndarray) -> "FileList":
        return FileList(self.root, self._names.take(pa.array(files)), self.sizes[files])

    def digest_parts(self) -> Iterator[bytes]:
        """Yield what identifies the files: names, sizes, and blocks of at most a thousand files, spread over all.

        A rewritten file may keep its size. Times of change are left out, since a copy has others.
        """
        yield from (b"%b\0%d\0" % (name.as_py(), size) for name, size in zip(self._names, self.sizes, strict=True))
        sampled = min(len(self), _SAMPLED_FILES)
        for number in range(sampled):
            num_blocks = max(3, min(_SAMPLED_BLOCKS // len(self), _BLOCKS_A_FILE))
            yield from self._sample(number * len(self) // sampled, num_blocks)

    def _sample(self, file: int, num_blocks: int) -> Iterator[bytes]:
        """Yield blocks of a file from its beginning to its end, or the number of the error that reading it meets."""
        last = max(0, int(self.sizes[file]) - _BLOCK_BYTES)  # beginning of the last block
        try:
            with self.path(file).open("rb", buffering=0) as stream:
                for begin in sorted({last * number // (num_blocks - 1) for number in range(num_blocks)}):
                    stream.seek(begin)
                    yield stream.read(_BLOCK_BYTES)
        except OSError as error:  # whoever reads the file counts and logs it
            yield f"\0{error.errno}".encode()


def list_files(source: Source) -> FileList:
    """List the files of a local source; DataError says that there are none, or that all are empty."""
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
    """Yield name and size of each file that `glob` chooses and `exclude` does not; what fails is logged."""
    library = source.kind in {"stdlib_code", "stdlib_text"}
    pattern = ("**/*.py" if library else source.pattern).split("/")
    exclude = [*_LIBRARY_EXCLUDES, *([f"!/{TOPICS}"] if source.kind == "stdlib_text" else [])]
    excluded = GitIgnoreSpec.from_lines(exclude if library else source.exclude).match_file

    def skip(name: str, reason: str | None) -> None:
        _log.warning("source %r: skipped %s: %s", source.name, name, reason)

    def skip_folder(error: OSError) -> None:
        skip(f"folder {os.path.relpath(error.filename, source.root) + '/'!r}", error.strerror)

    for folder, subfolders, files in os.walk(source.root, followlinks=True, onerror=skip_folder):
        prefix = "" if folder == str(source.root) else os.path.relpath(folder, source.root) + "/"
        entered = []
        for name in subfolders:
            if excluded(prefix + name + "/"):
                continue
            path = Path(folder, name)
            if path.is_symlink() and Path(folder).resolve().is_relative_to(path.resolve()):
                skip(repr(prefix + name), "a symbolic link to a folder that it lies in")
            else:
                entered.append(name)
        subfolders[:] = entered  # os.walk goes on into these
        for name in files:
            if not _matches([*prefix.split("/")[:-1], name], pattern) or excluded(prefix + name):
                continue
            try:
                found = os.stat(f"{folder}/{name}")  # noqa: PTH116  # a Path takes longer; it raises for a broken link
            except OSError as error:
                skip(repr(prefix + name), error.strerror)
                continue
            if stat.S_ISREG(found.st_mode):
                yield os.fsencode(prefix + name), found.st_size


def _matches(names: list[str], patterns: list[str]) -> bool:
    """Match a path with a glob, both split at "/", as `Path.glob` does; `**` at the end means all files there."""
    if not patterns:
        return not names
    if patterns[0] == "**":
        return any(len(patterns) == 1 or _matches(names[at:], patterns[1:]) for at in range(len(names)))
    return bool(names) and fnmatchcase(names[0], patterns[0]) and _matches(names[1:], patterns[1:])
