"""The child of `programs.py`: confines itself and then runs a generated program. It imports the standard library only.

Its source is passed to `python -c`, so that a user who may not read this file can run it. Standard input has a JSON
document: the program, the limits, the folder, whether the process is in namespaces of its own, and what to write to
which file descriptor once it is ready, once the program has come to its end, and if its time on the CPU is over.

Tested by tests/unit/evaluation/test_programs.py.
"""

import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any

# From Linux's headers: sys/mount.h, linux/mount.h, linux/prctl.h, asm/unistd.h (the same number on every architecture).
_NOSUID_NODEV = 2 | 4
_SYS_MOUNT_SETATTR = 442
_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000
_MOUNT_ATTR_RDONLY = 1
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITY_VERSION = 0x20080522
_MOST_CAPABILITIES = 64

_SECONDS_BETWEEN = 0.02  # of looks at the number of processes


def _confine(folder: str, folder_mib: int) -> None:
    """Make all files read-only but for an empty folder in memory, and give up every capability.

    The process is the root user of its own user and mount namespaces.

    Raises:
        OSError: The kernel does not allow it.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def check(status: int) -> None:
        if status != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    read_only = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_RDONLY, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(read_only))
    check(libc.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, read_only, size))
    options = f"size={folder_mib}m,nr_inodes=4096,mode=700".encode()
    check(libc.mount(b"tmpfs", folder.encode(), b"tmpfs", ctypes.c_ulong(_NOSUID_NODEV), options))
    for capability in range(_MOST_CAPABILITIES):  # the kernel refuses those that it does not know
        libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0)
    check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    check(libc.capset((ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()))


def _limit(limits: dict[str, int]) -> None:
    for name, value in limits.items():
        limit = getattr(resource, name)
        _, most = resource.getrlimit(limit)
        hard = value + 1 if limit == resource.RLIMIT_CPU else value  # the program gets SIGXCPU before it is killed
        allowed = [each if most == resource.RLIM_INFINITY else min(each, most) for each in (value, hard)]
        resource.setrlimit(limit, (allowed[0], allowed[1]))


def _run(order: dict[str, Any]) -> None:
    """Run the program and say so once it has come to its end; exit at once, whatever threads it has left."""
    sys.argv[:] = ["program"]
    exec(compile(order["program"], "<program>", "exec"), {"__name__": "__main__"})  # noqa: S102 - what it is for
    sys.stdout.flush()
    os.write(order["channel"], order["ended"].encode())
    os._exit(0)


def _main(order: dict[str, Any]) -> None:
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123 - pathlib is slow to import
        os.dup2(nothing.fileno(), 0)
    if order["is_isolated"]:
        _confine(order["folder"], order["folder_mib"])
    os.chdir(order["folder"])
    _limit(order["limits"])
    os.write(order["channel"], order["ready"].encode())
    # This process is the first of its namespace, which ignores most signals. The program is to be an ordinary one.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    program = os.fork()
    if program == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        _run(order)
    _watch(program, order)


def _watch(program: int, order: dict[str, Any]) -> None:
    """Wait until the program has ended, and end it if it has too many processes; its others end with this one."""
    while True:
        signal.sigtimedwait({signal.SIGCHLD}, _SECONDS_BETWEEN)
        while (pid_and_status := os.waitpid(-1, os.WNOHANG))[0]:
            if pid_and_status[0] == program:
                if os.WIFSIGNALED(pid_and_status[1]) and os.WTERMSIG(pid_and_status[1]) == signal.SIGXCPU:
                    os.write(order["channel"], order["out_of_time"].encode())
                os._exit(0)
        # The kernel does not hold root to RLIMIT_NPROC. In a namespace of its own, /proc has this process's alone.
        names = os.listdir("/proc") if order["is_isolated"] else []  # noqa: PTH208 - pathlib is slow to import
        if sum(map(str.isdecimal, names)) > 1 + order["processes"]:
            os.kill(-1, signal.SIGKILL)


if __name__ == "__main__":
    _main(json.loads(sys.stdin.buffer.read()))
