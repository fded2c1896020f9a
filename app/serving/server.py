"""Runs the application until a signal ends it. Tested by tests/integration/test_serving.py."""

import signal
import socket
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from app.serving.scheduler import Scheduler


class _Server(uvicorn.Server):  # type: ignore[misc]  # the extra is not always there to be checked against
    """Tells the scheduler of the signal at once, since connections that are open can still bring requests."""

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler) -> None:
        super().__init__(config)
        self.scheduler = scheduler

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.scheduler.refuse_more()
        super().handle_exit(sig, frame)


def run_server(application: Starlette, scheduler: Scheduler, bound: socket.socket) -> None:
    """Answer requests on a bound socket. After SIGTERM or Ctrl-C, finish those that were taken, and return.

    A second Ctrl-C ends it at once.
    """
    config = uvicorn.Config(application, log_config=None, access_log=False, ws="none", server_header=False)
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again when it has finished
    try:
        _Server(config, scheduler).run(sockets=[bound])
    finally:
        signal.signal(signal.SIGTERM, before)
