"""SIGUSR1 while `layerskip fit` starts: noted, since a job whose time is up is to be queued again, not to die of it.

Importing, reading a corpus and loading weights can take longer than SLURM's notice. SIGTERM ends a process that has
nothing to save, as always.
"""

from __future__ import annotations

import signal

_received: list[int] = []


def note_startup_signals() -> None:
    """From now on, until something else listens."""
    signal.signal(signal.SIGUSR1, lambda signum, _: _received.append(signum))


def take_startup_signal() -> int | None:
    """What was received; it is told once."""
    received = _received[0] if _received else None
    _received.clear()
    return received
