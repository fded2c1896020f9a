"""Holds transformers' warnings while a verb may be refused. Tested by tests/contract/test_command_line.py."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler

_LOGGER = logging.getLogger("transformers")
_MOST = 1000  # a verb that says more than this is shown to say it


@contextmanager
def warnings_held() -> Iterator[None]:
    """Hold what transformers logs until `show_warnings`, or the end of the block; drop it at an error in the block."""
    shown = _LOGGER.handlers[:]
    _LOGGER.handlers[:] = [
        MemoryHandler(_MOST, flushLevel=logging.CRITICAL, target=handler, flushOnClose=False) for handler in shown
    ]
    try:
        yield
        show_warnings()
    finally:
        _LOGGER.handlers[:] = shown


def show_warnings() -> None:
    """Show what was held until now, and at once what comes."""
    for handler in _LOGGER.handlers:
        if isinstance(handler, MemoryHandler):
            handler.capacity = 0
            handler.flush()
