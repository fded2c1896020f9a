"""Only one run at a time writes to a folder, since two runs would write to the same partial files.

The lock is a record lock of the kernel (fcntl) on a small file that names its holder. It ends with the process, is not
inherited by data workers, and holds across machines on NFS. Packages that lock files empty them first, and so a second
run could not name the first.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.errors import CheckpointError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_log = logging.getLogger(__name__)

LOCK_FILE = ".fit.lock"
_held: dict[Path, int] = {}  # open descriptors by file: closing one would release its lock


def checkpoint_folders(trainer: Trainer) -> list[Path]:
    """The folders on a disk that the callbacks of a run write checkpoints to."""
    beside_logs = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
    savers: list[Any] = trainer.checkpoint_callbacks
    folders = {str(getattr(saver, "dirpath", None) or beside_logs) for saver in savers}
    return [Path(folder) for folder in sorted(folders) if "://" not in folder]


def hold_run(trainer: Trainer) -> None:
    """Hold every folder that a run writes checkpoints to, all ranks together. Raises CheckpointError as `hold`."""
    folders = checkpoint_folders(trainer)  # computed on all ranks, since the logger broadcasts its folder
    for folder in folders if trainer.is_global_zero else ():
        hold(folder)


def hold(folder: Path) -> None:
    """Let no run of another process write to a folder, made if need be, until `release` or the end of this process.

    On a file system without locks, this warns and goes on.

    Raises:
        CheckpointError: Another run writes there; it names that run's process and host.
    """
    file = folder.absolute() / LOCK_FILE
    if file in _held:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(file, descriptor):
                break
            os.close(descriptor)  # a run that ended meanwhile has removed the file
        except OSError as error:
            owner = os.read(descriptor, 300).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                _log.warning(
                    "%s cannot be locked (%s): see to it that no other run writes there%s",
                    *(folder, error.strerror, f"; the one before was {owner}" if owner else ""),
                )
                return
            if owner.startswith(f"process {os.getppid()} "):  # it started this process as a rank of its run
                return
            raise CheckpointError(
                f"{folder}: another fit writes there, {owner or 'which has not said its name yet'}: wait for it or stop"
                " it, or give this run another name (--trainer.logger.init_args.name). If there is no such process any"
                f" more, remove {file}"
            ) from error
    _held[file] = descriptor
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())


def release() -> None:
    """Release all folders that this process holds."""
    while _held:
        file, descriptor = _held.popitem()
        file.unlink(missing_ok=True)
        os.close(descriptor)


def _is_still(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
