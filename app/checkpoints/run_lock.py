"""One run writes to a folder at a time: two would write into the same partial files.

The lock is a record lock of the kernel (fcntl) on a small file that tells who holds it: gone with its process, however
that ends, not shared with data workers, and kept by NFS across machines. Packages that lock files empty them first, so
that a second run could not say who the first one is.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from app.checkpoints.atomic import checkpoint_folders
from app.errors import CheckpointError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_log = logging.getLogger(__name__)

LOCK_FILE = ".fit.lock"
_held: dict[Path, int] = {}  # descriptors by file: closing one would give the lock back


def hold_run(trainer: Trainer) -> None:
    """Hold every folder that a run writes checkpoints to; all ranks ask together.

    Raises:
        CheckpointError: As `hold`.
    """
    folders = checkpoint_folders(trainer)  # asked on all ranks: the logger's is broadcast
    for folder in folders if trainer.is_global_zero else ():
        hold(folder)


def hold(folder: Path) -> None:
    """Let no other process's run write to a folder until `release`, or the end of this process.

    Where the file system has no locks, this warns and goes on.

    Args:
        folder: Made if it is not there.

    Raises:
        CheckpointError: Another run writes there; naming its process and host.
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
            os.close(descriptor)  # of a run that ended in between and removed it
        except OSError as error:
            owner = os.read(descriptor, 300).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                _log.warning(
                    "%s cannot be locked (%s): see to it that no other run writes there%s",
                    *(folder, error.strerror, f"; the one before was {owner}" if owner else ""),
                )
                return
            if owner.startswith(f"process {os.getppid()} "):  # which started this one for a rank of its run
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
    """Give back what this process holds."""
    while _held:
        file, descriptor = _held.popitem()
        file.unlink(missing_ok=True)
        os.close(descriptor)


def _is_still(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
