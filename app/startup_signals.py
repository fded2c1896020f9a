"""Notes a SIGUSR1 that arrives while `layerskip fit` starts, so that the job is queued again instead of ended.

Importing, reading a corpus and loading weights can take longer than SLURM's notice. SIGTERM still ends the process,
which has nothing to save yet. Tested by tests/integration/test_preemption.py.
"""

import signal

_received: list[int] = []


def note_startup_signals() -> None:
    """Note SIGUSR1 from now on, until something else handles it."""
    signal.signal(signal.SIGUSR1, lambda signum, _: _received.append(signum))


def take_startup_signal() -> int | None:
    """The signal that was received, if any; it is returned only once."""
    received = _received[0] if _received else None
    _received.clear()
    return received
