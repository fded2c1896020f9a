"""What a data worker process does before its first batch."""

from __future__ import annotations

import os
import signal
import threading

_OF_THE_RUN = {signal.SIGTERM, signal.SIGUSR1}


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
