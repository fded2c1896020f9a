"""Data worker processes: what each does before its first batch, and how the death of one is reported."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing.connection import wait
from typing import Any

from torch.utils.data import DataLoader

_RUN_SIGNALS = {signal.SIGTERM, signal.SIGUSR1}
_SECONDS_TO_END = 5.0


class WorkerLoader(DataLoader[Any]):
    """A DataLoader that reports a dead worker as such; give it `worker_init_fn=prepare_worker`.

    torch looks for a dead worker only when it cannot receive a batch. The kernel closes a process's sockets a moment
    before it ends the process, and within that moment torch reports a broken socket.

    Workers start when the first batch is asked for. A schedule built on `trainer.estimated_stepping_batches` makes
    Lightning create the iterator before it restores a checkpoint, and workers would read from the first row on.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield batches, or raise RuntimeError, as torch words it, if a worker died."""
        batches = super().__iter__()
        workers = multiprocessing.active_children()
        try:
            yield from batches
        except (ConnectionError, EOFError) as error:
            ended = wait([worker.sentinel for worker in workers], timeout=_SECONDS_TO_END) if workers else []
            if not (dead := [worker for worker in workers if worker.sentinel in ended]):
                raise
            for worker in dead:
                worker.join()  # torch's handler of the signal that a child ended may raise its own report here
            pids = ", ".join(str(worker.pid) for worker in dead)
            raise RuntimeError(f"DataLoader worker (pid(s) {pids}) exited unexpectedly") from error

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the datamodule keeps the position, or the optimizer step tells it."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore nothing. Lightning takes a loader with these two methods for one that can stop inside an epoch."""


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
