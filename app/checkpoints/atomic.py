"""How a checkpoint becomes whole or absent: a process that is killed at any moment leaves a whole one behind.

A checkpoint NAME is written as `.NAME.partial`. Once it is complete and flushed to the disk, `publish` renames the
checkpoint that has the name to `.NAME.previous`, renames the new one to NAME and deletes the old one. A directory
cannot be renamed over one that is not empty, so for an instant no checkpoint is called NAME; `find_checkpoint` then
returns `.NAME.previous`. Renames work on NFS and Lustre as on local disks; only Linux can exchange two names at once.
"""

import os
import shutil
from pathlib import Path


def partial_path(path: Path) -> Path:
    """The name under which checkpoint `path` is written."""
    return path.with_name(f".{path.name}.partial")


def previous_checkpoint(path: Path) -> Path:
    """The name under which the checkpoint before `path` is kept; no glob pattern for `last` matches it."""
    return path.with_name(f"before_{path.name}")


def find_checkpoint(path: Path) -> Path:
    """`path`, or the checkpoint that it was about to replace if the process died between the two renames."""
    replaced = _replaced_path(path)
    return replaced if replaced.exists() and not path.exists() else path


def restore_interrupted(folder: Path) -> None:
    """Give checkpoints whose replacement was interrupted their names back; several processes may do so at once."""
    for replaced in folder.glob(".*.previous"):
        path = folder / replaced.name.removeprefix(".").removesuffix(".previous")
        if not path.exists():
            try:
                replaced.rename(path)
            except OSError:
                if not path.exists():  # no other process did it either
                    raise


def clear_leftovers(folder: Path) -> None:
    """Delete what killed processes left half written or half deleted; only the run that writes to `folder` may."""
    restore_interrupted(folder)
    for pattern in (".*.ckpt.partial", ".*.ckpt.removed", ".*.ckpt.previous"):
        for leftover in folder.glob(pattern):
            _delete(leftover)


def publish(path: Path, *, keep_previous: bool = False) -> None:
    """Rename the complete and flushed `partial_path(path)` to `path`; the checkpoint there survives until then.

    With `keep_previous` that checkpoint is kept as `previous_checkpoint(path)`.
    """
    partial, replaced, previous = partial_path(path), _replaced_path(path), previous_checkpoint(path)
    if path.is_file() and partial.is_file() and not keep_previous:
        partial.replace(path)
    else:
        if path.exists():
            _delete(replaced)
            path.rename(replaced)
        partial.rename(path)
    flush(path.parent)
    if replaced.exists():
        if keep_previous:
            remove(previous)
            replaced.rename(previous)
        else:
            _delete(replaced)


def remove(path: Path) -> None:
    """Delete a checkpoint if it exists; one that is half deleted no longer has its name."""
    if path.exists():
        removed = path.with_name(f".{path.name}.removed")
        _delete(removed)
        path.rename(removed)
        _delete(removed)


def flush(path: Path) -> None:
    """Write a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replaced_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
