"""Data worker processes: what each does before its first batch, and how the death of one is reported."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader

_RUN_SIGNALS = {signal.SIGTERM, signal.SIGUSR1}
_SECONDS_TO_END = 5.0


class WorkerLoader(DataLoader[Any]):
    """A DataLoader that reports a dead worker as such; give it `worker_init_fn=prepare_worker`.

    A worker's death is raised where a batch is asked for that never comes. torch also handles SIGCHLD, and then raises
    the death at whatever line the run has reached: in the midst of an optimizer step, or of a checkpoint's writing.

    torch looks for a dead worker only when it cannot receive a batch. The kernel closes a process's sockets a moment
    before it ends the process, and within that moment torch reports a broken socket.

    Workers start when the first batch is asked for. A schedule built on `trainer.estimated_stepping_batches` makes
    Lightning create the iterator before it restores a checkpoint, and workers would read from the first row on.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield batches, or raise RuntimeError, as torch words it, if a worker died."""
        before = signal.getsignal(signal.SIGCHLD)
        batches = super().__iter__()
        if signal.getsignal(signal.SIGCHLD) is not before:  # torch handles it once, for all loaders of a process
            signal.signal(signal.SIGCHLD, before)
        workers = multiprocessing.active_children()
        try:
            yield from batches
        except (ConnectionError, EOFError, RuntimeError) as error:
            # torch's own report, a RuntimeError, comes after the death and does not say how the worker died.
            limit = 0 if isinstance(error, RuntimeError) else _SECONDS_TO_END
            ended = wait([worker.sentinel for worker in workers], timeout=limit) if workers else []
            dead = [worker for worker in workers if worker.sentinel in ended and worker.exitcode != 0]
            if not dead:
                raise
            raise RuntimeError(_death_of(dead[0])) from error

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the datamodule keeps the position, or the optimizer step tells it."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore nothing. Lightning takes a loader with these two methods for one that can stop inside an epoch."""


def _death_of(worker: BaseProcess) -> str:
    """Tell how a worker died, in torch's words."""
    worker.join()
    assert worker.exitcode is not None
    killed = f"is killed by signal: {signal.strsignal(-worker.exitcode)}." if worker.exitcode < 0 else ""
    return f"DataLoader worker (pid {worker.pid}) {killed or 'exited unexpectedly'}"


def prepare_worker(worker: int) -> None:  # noqa: ARG001  # torch's signature
    """Make a worker use one thread, and obey its parent alone.

    SLURM and `kill -TERM -- -GROUP` signal all processes of a job. The training process then finishes its step and
    saves, for which its workers must live on; it ends them itself with SIGTERM.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # workers share the machine, and tokenizers warn after a fork
    if not hasattr(signal, "sigwaitinfo"):  # macOS does not tell who sent a signal
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, _RUN_SIGNALS)  # threads made later inherit the mask
    threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()


def _obey_parent(parent: int) -> None:
    while (received := signal.sigwaitinfo(_RUN_SIGNALS)).si_pid != parent or received.si_signo != signal.SIGTERM:
        pass
    os._exit(0)
