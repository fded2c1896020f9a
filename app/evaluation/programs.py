"""Runs generated programs, confined, to see whether they come to their end without an error.

This keeps accidents away from the user's files, processes and network. It is no security boundary: a program written
to break out may use a fault of the kernel, and one written to cheat may say that its tests have passed.

Confined means, on Linux where the kernel lets a user have namespaces:

- no network, not even to this machine; no other process can be seen, and all of the program's end with it, daemons too;
- every file is read-only but for an empty folder in memory of limited size, which is working folder, HOME and TMPDIR;
- no capabilities; where this process is root's, the program is run by nobody, if nobody may run this interpreter;
- limits on wall-clock time and the number of processes, and for each of them on CPU time, memory, open files;
- an environment of its own, an empty standard input, an output of which the beginning is kept.

What is not limited: reading files that the user may read, and memory of all processes together. Elsewhere than in
namespaces the network is open, files can be written, root may have any number of processes, and a daemon that leaves
the program's session goes on; a warning says so. A container or a virtual machine around the whole evaluation is the
better fence.
"""

import json
import logging
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from app.errors import ConfigError, shortened

_log = logging.getLogger(__name__)

Outcome = Literal["passed", "failed", "timed out"]

# User, mount, network and process namespaces. `timeout` ends the program if this process is killed.
_NAMESPACES = (
    "unshare",
    "--map-root-user",
    "--net",
    "--ipc",
    "--uts",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
)
_NOBODY = 65534
_CHILD = Path(__file__).with_name("program_child.py")
_READY, _OUT_OF_TIME = "ready ", "out of time"  # what the child reports
_POLL_SECONDS, _START_SECONDS = 0.02, 30.0
_ALLOWED = "true on a machine that can run programs"


@dataclass(frozen=True, kw_only=True)
class ProgramLimits:
    """What a program may use; `cpu_seconds`, `memory_mib` and `open_files` are for each of its processes."""

    wall_seconds: float = 15.0
    cpu_seconds: int = 10
    memory_mib: int = 1024
    folder_mib: int = 64  # of all files together, and so of each
    processes: int = 16  # processes and threads
    open_files: int = 64
    output_bytes: int = 16_384  # kept of standard output and error


class ProgramResult(NamedTuple):
    """What came of a program; `output` is the beginning of what it wrote, errors too."""

    outcome: Outcome
    output: str
    seconds: float


class ProgramRunner:
    """Runs programs, one at a time; `is_isolated` says whether they are run in namespaces.

    Raises:
        ConfigError: This machine cannot run programs at all.
    """

    def __init__(self, limits: ProgramLimits | None = None) -> None:
        self.limits = limits or ProgramLimits()
        users = (_NOBODY, None) if os.geteuid() == 0 else (None,)
        isolated = [(True, user) for user in users if sys.platform == "linux"]
        refused = "unshare is for Linux"
        for self.is_isolated, self._user in [*isolated, (False, None)]:  # the best fence first
            reason = self._refusal()
            if reason is None:
                break
            refused = reason
        else:
            raise ConfigError("allow_running_programs", got=refused, allowed=_ALLOWED)
        if not self.is_isolated:
            _log.warning(
                "programs are run without namespaces (%s): with network, and as a user who can write your files; see"
                " app/evaluation/programs.py",
                refused,
            )

    def _refusal(self) -> str | None:
        """Why not even an empty program can be run in the present way; None if it can."""
        try:
            result = self.run("")
        except ConfigError as error:
            return str(error.got)
        return None if result.outcome == "passed" else f"an empty program {result.outcome}"

    def run(self, program: str) -> ProgramResult:
        """Run a Python program; it has passed if it was executed to its last line.

        Ending before, by an error, a signal or `sys.exit(0)`, is a failure.

        Raises:
            ConfigError: The program could not be started.
        """
        started = time.monotonic()
        ended = secrets.token_hex(16)  # so that a program does not say by accident that it has passed
        with self._process(program, ended) as (process, channel):
            said = _read(process, channel, self.limits)
            timed_out = process.poll() is None
        written = said["output"].decode(errors="replace")
        report = said["channel"].decode(errors="replace")
        if not report.startswith(_READY):
            reason = written.strip().splitlines()[-1:] or ["it said nothing"]
            raise ConfigError("allow_running_programs", got=shortened(reason[0]), allowed=_ALLOWED)
        timed_out = timed_out or report.endswith(_OUT_OF_TIME)
        outcome: Outcome = "passed" if ended in report else "timed out" if timed_out else "failed"
        return ProgramResult(outcome, written, time.monotonic() - started)

    @contextmanager
    def _process(self, program: str, ended: str) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
        """The running program and the pipe of its reports; on leaving, all of it is killed and its folder removed."""
        limits, channel, theirs = self.limits, *os.pipe()
        with (
            tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True) as folder,
            tempfile.TemporaryFile() as order,
        ):
            order.write(json.dumps(self._order(program, folder, theirs, ended)).encode())
            order.seek(0)
            python = (sys.executable, "-s", "-P", "-B", "-c", _CHILD.read_text("utf-8"))
            backstop = ("timeout", "--signal=KILL", str(limits.wall_seconds + 2 * _START_SECONDS))
            try:
                if self._user is not None:  # whom a container may not have
                    os.chown(folder, self._user, self._user)
                process = subprocess.Popen(  # noqa: S603 - the point of this file
                    (*backstop, *_NAMESPACES, *python) if self.is_isolated else python,
                    stdin=order,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    cwd=folder,
                    env={
                        "PATH": "/usr/local/bin:/usr/bin:/bin",
                        "HOME": folder,
                        "TMPDIR": folder,
                        "LANG": "C.UTF-8",
                        "PYTHONHASHSEED": "0",  # so that a verdict is the same the next time
                        "OPENBLAS_NUM_THREADS": "1",
                    },
                    start_new_session=True,
                    pass_fds=[theirs],
                    user=self._user,
                    group=self._user,
                    extra_groups=None if self._user is None else [],
                )
            except OSError as error:
                os.close(channel)
                raise ConfigError("allow_running_programs", got=shortened(error), allowed=_ALLOWED) from error
            finally:
                os.close(theirs)
            try:
                yield process, channel
            finally:
                os.close(channel)
                _kill(process)

    def _order(self, program: str, folder: str, channel: int, ended: str) -> dict[str, Any]:
        """What the child is told; see `program_child.py`."""
        limits, mib = self.limits, 2**20
        return {
            "program": program,
            "folder": folder,
            "folder_mib": limits.folder_mib,
            "is_isolated": self.is_isolated,
            "processes": limits.processes,
            "channel": channel,
            "ready": _READY,
            "ended": ended,
            "out_of_time": _OUT_OF_TIME,
            "limits": {
                "RLIMIT_CPU": limits.cpu_seconds,
                "RLIMIT_AS": limits.memory_mib * mib,
                "RLIMIT_FSIZE": limits.folder_mib * mib,
                # The kernel counts all of the user's processes, and in a namespace those that are in it.
                "RLIMIT_NPROC": 1 + limits.processes + (0 if self.is_isolated else _num_threads_of_user()),
                "RLIMIT_NOFILE": limits.open_files,
                "RLIMIT_CORE": 0,
            },
        }


def _read(process: "subprocess.Popen[bytes]", channel: int, limits: ProgramLimits) -> dict[str, bytearray]:
    """Read output and reports until the process ends or its time is over; what exceeds the limit is thrown away.

    The program's time counts from when the child is ready, which takes long on a busy machine.
    """
    assert process.stdout is not None
    said = {"output": bytearray(), "channel": bytearray()}
    deadline, is_ready, has_ended = time.monotonic() + _START_SECONDS, False, False
    with selectors.DefaultSelector() as pipes:
        pipes.register(process.stdout, selectors.EVENT_READ, "output")
        pipes.register(channel, selectors.EVENT_READ, "channel")
        while time.monotonic() < deadline:
            has_ended = has_ended or process.poll() is not None
            readable = pipes.select(0.0 if has_ended else _POLL_SECONDS)
            if has_ended and not readable:
                break
            for key, _ in readable:
                chunk, kept = os.read(key.fd, 65_536), said[key.data]
                if not chunk:
                    pipes.unregister(key.fileobj)
                kept += chunk[: limits.output_bytes - len(kept)]
            if not is_ready and said["channel"]:
                deadline, is_ready = time.monotonic() + limits.wall_seconds, True
    return said


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill the process group of a program; its namespace goes with it."""
    with suppress(ProcessLookupError):  # it has ended, and so has all of its group
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def _num_threads_of_user() -> int:
    """How many threads this process's user has on Linux; a large number where /proc does not say."""
    own, count = os.getuid(), 0
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            count += len([*entry.joinpath("task").iterdir()]) if entry.stat().st_uid == own else 0
        except OSError:  # it has ended
            continue
    return count or 4096
