"""How a checkpoint takes its place: whatever is killed at whatever moment, a whole one stands.

A checkpoint NAME is written as `.NAME.partial`, which needs no process id: one run at a time writes to a folder
(`run_lock`). Once it is whole and flushed, what stood under NAME becomes `.NAME.previous`, the new one takes the name,
and the previous one goes. A directory cannot be renamed over another that is not empty, so for an instant nothing is
called NAME: who finds that takes `.NAME.previous` (`standing`). Two renames are all it needs, which NFS and Lustre do
as local disks do; the exchange of two names is Linux's alone, and a link in the place of the checkpoint would be what a
user copies instead of it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # mistakes on the command line are told without loading Lightning
    from lightning.pytorch import Trainer

_came_from: set[Path] = set()  # checkpoints that runs of this process go on from


def checkpoint_folders(trainer: Trainer) -> list[Path]:
    """Where a run's callbacks write checkpoints, as far as that is on a disk."""
    beside_logs = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
    savers: list[Any] = trainer.checkpoint_callbacks
    folders = {str(getattr(saver, "dirpath", None) or beside_logs) for saver in savers}
    return [Path(folder) for folder in sorted(folders) if "://" not in folder]


def go_on_from(path: Path) -> None:
    """Remember what a run was read from; were it a kept one, what took its place is damaged or not wanted."""
    _came_from.add(path.resolve())


def partial_of(path: Path) -> Path:
    """Where `path` is written."""
    return path.with_name(f".{path.name}.partial")


def kept_previous(path: Path) -> Path:
    """The name of the checkpoint before `path`, where that is kept; no pattern for `last` finds it."""
    return path.with_name(f"before_{path.name}")


def standing(path: Path) -> Path:
    """`path`, or the checkpoint that was to be replaced if the replacement was interrupted between its renames."""
    previous = _previous_of(path)
    return previous if previous.exists() and not path.exists() else path


def restore_interrupted(folder: Path) -> None:
    """Give back their names to checkpoints whose replacement was interrupted; any number of processes may."""
    for previous in folder.glob(".*.previous"):
        path = folder / previous.name.removeprefix(".").removesuffix(".previous")
        if not path.exists():
            try:
                previous.rename(path)
            except OSError:
                if not path.exists():  # nobody else did it either
                    raise


def clear_leftovers(folder: Path) -> None:
    """Remove what killed processes left half written or half removed; only for the one who writes to the folder."""
    restore_interrupted(folder)
    for pattern in (".*.ckpt.partial", ".*.ckpt.removed", ".*.ckpt.previous"):
        for left in folder.glob(pattern):
            _delete(left)


def put_in_place(path: Path, *, keep_previous: bool = False) -> None:
    """Let the whole and flushed `partial_of(path)` take its name.

    Args:
        path: Where it is to stand; what stood there survives until then.
        keep_previous: Keep that as `kept_previous(path)`; not in the place of the one that the run came from.
    """
    partial, previous = partial_of(path), _previous_of(path)
    kept = kept_previous(path).resolve()
    keep_previous = keep_previous and kept not in _came_from
    if path.is_file() and partial.is_file() and not keep_previous:
        partial.replace(path)
    else:
        if path.exists():
            _delete(previous)
            path.rename(previous)
        partial.rename(path)
    flush_folder(path.parent)
    if previous.exists():
        if keep_previous:
            remove(kept_previous(path))
            previous.rename(kept_previous(path))
        else:
            _delete(previous)
    _came_from.discard(kept)  # what stands now is whole, and may take its place


def remove(path: Path) -> None:
    """Remove a checkpoint, if there is one; half removed it is not called by its name any more."""
    if path.exists():
        removed = path.with_name(f".{path.name}.removed")
        _delete(removed)
        path.rename(removed)
        _delete(removed)


def flush_folder(folder: Path) -> None:
    """Bring the names in it to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _previous_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
