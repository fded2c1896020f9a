"""Data worker processes: what one does before its first batch, and what is said of one that died."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing.connection import wait
from typing import Any

from torch.utils.data import DataLoader

_OF_THE_RUN = {signal.SIGTERM, signal.SIGUSR1}
_TO_END_SECONDS = 5.0


class WorkerLoader(DataLoader[Any]):
    """A DataLoader that tells of a worker that died, whenever it did; give it `worker_init_fn=prepare_worker`.

    torch looks for a dead worker where a batch cannot be received; but the kernel closes a process's sockets a moment
    before it ends the process, and who asks within that moment is told of a socket.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches; workers start when the first is asked for.

        Raises:
            RuntimeError: A worker died, as torch words it.
        """
        batches = super().__iter__()
        workers = multiprocessing.active_children()
        try:
            yield from batches
        except (ConnectionError, EOFError) as error:
            ended = wait([worker.sentinel for worker in workers], timeout=_TO_END_SECONDS) if workers else []
            if not (dead := [worker for worker in workers if worker.sentinel in ended]):
                raise
            for worker in dead:
                worker.join()  # within, torch tells of it by itself where the signal that a child ended is handled
            pids = ", ".join(str(worker.pid) for worker in dead)
            raise RuntimeError(f"DataLoader worker (pid(s) {pids}) exited unexpectedly") from error


def prepare_worker(worker: int) -> None:  # noqa: ARG001  # torch's signature
    """Take one thread, and leave signals that are meant for the run to the process that trains.

    SLURM and `kill -TERM -- -GROUP` signal all processes of a job. The one that trains then finishes its step and
    saves, for which its workers must live on; it ends them itself, by SIGTERM.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # workers share the machine, and tokenizers warn after a fork
    if not hasattr(signal, "sigwaitinfo"):  # macOS does not tell who sent a signal
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_RUN)  # threads made later inherit it
    threading.Thread(target=_obey_the_parent, args=(os.getppid(),), daemon=True).start()


def _obey_the_parent(parent: int) -> None:
    while (received := signal.sigwaitinfo(_OF_THE_RUN)).si_pid != parent or received.si_signo != signal.SIGTERM:
        pass
    os._exit(0)
