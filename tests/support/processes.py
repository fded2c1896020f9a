"""Two processes on this machine, forked, with gloo; a deadlock is reported instead of waited for."""

import os
import queue
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp


def _child(
    rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...], results: Any
) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
    }
    torch.set_num_threads(1)
    results.put((rank, function(*args)))


def run_ranks(function: Callable[..., Any], *args: Any, world_size: int = 2, limit_seconds: float = 240) -> list[Any]:
    """`function(*args)` in each of `world_size` processes that Lightning takes for ranks; results by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("fork")
    results = context.Queue()
    children = [
        context.Process(target=_child, args=(rank, world_size, port, function, args, results))
        for rank in range(world_size)
    ]
    for child in children:
        child.start()
    finished: dict[int, Any] = {}
    try:
        deadline = time.monotonic() + limit_seconds
        while len(finished) < world_size:
            try:
                rank, result = results.get(timeout=0.5)
                finished[rank] = result
            except queue.Empty:
                crashed = [rank for rank, child in enumerate(children) if child.exitcode]
                if crashed or time.monotonic() > deadline:
                    pytest.fail(f"ranks {crashed} crashed, ranks {sorted(finished)} finished; the others hang")
    finally:
        for child in children:
            child.join(timeout=5)
            child.kill()
    return [finished[rank] for rank in range(world_size)]
