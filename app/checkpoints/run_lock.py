"""Only one run at a time writes to a folder, since two runs would write to the same partial files.

The lock is a record lock of the kernel (fcntl) on a small file that names its holder. It ends with the process, is not
inherited by data workers, and holds across machines on NFS. Packages that lock files empty them first, and so a second
run could not name the first.
"""

import errno
import fcntl
import logging
import os
import socket
from pathlib import Path

from app.errors import CheckpointError

_log = logging.getLogger(__name__)

LOCK_FILE = ".fit.lock"
OTHER_FOLDER = (
    "give this run a folder of its own (--trainer.logger.init_args.name, or --trainer.default_root_dir where no logger"
    " has one)"
)
_held: dict[Path, int] = {}  # open descriptors by file: closing one would release its lock


def hold(folder: Path) -> None:
    """Let no run of another process write to a folder, made if need be, until `release` or the end of this process.

    CheckpointError names the process and host of a run that writes there. A file system without locks gives a warning.
    """
    file = folder.absolute() / LOCK_FILE
    if file in _held:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        if not lock(descriptor, folder):
            owner = os.read(descriptor, 300).decode(errors="replace").strip()
            os.close(descriptor)
            if owner.startswith(f"process {os.getppid()} "):  # it started this process as a rank of its run
                return
            raise CheckpointError(
                f"{folder}: another fit writes there, {owner or 'which has not said its name yet'}: wait for it or stop"
                f" it, or {OTHER_FOLDER}. If there is no such process any more, remove {file}"
            )
        if _is_still(file, descriptor):
            break
        os.close(descriptor)  # a run that ended meanwhile has removed the file
    _held[file] = descriptor
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())


def is_held(folder: Path) -> bool:
    """Whether a run writes to a folder now, as far as this machine can tell."""
    file = folder.absolute() / LOCK_FILE
    if file in _held:
        return True
    try:
        with file.open("rb") as lock:
            fcntl.lockf(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released at once, with the file
    except FileNotFoundError:
        return False
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)
    return False


def release() -> None:
    """Release all folders that this process holds."""
    while _held:
        file, descriptor = _held.popitem()
        file.unlink(missing_ok=True)
        os.close(descriptor)


def lock(descriptor: int, folder: Path, *, wait: bool = False) -> bool:
    """Lock an open file, or warn that its disk has no locks; False if another process holds it, unless told to wait."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        _log.warning("%s cannot be locked (%s): see to it that no other run writes there", folder, error.strerror)
    return True


def _is_still(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
