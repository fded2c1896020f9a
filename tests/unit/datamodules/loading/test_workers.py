"""Data workers: signals of the run are not theirs, their parent ends them, and one that died is told of."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from torch.utils.data import DataLoader
from torch.utils.data import dataloader as torchs

from datamodules.loading import workers
from datamodules.loading.workers import WorkerLoader, prepare_worker


class WhoAndHow:
    """Rows that tell of the process that makes them."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[int, str]:
        return os.getpid(), os.environ["TOKENIZERS_PARALLELISM"]


class Unreadable(WhoAndHow):
    """Rows on a share that the network lost."""

    def __getitem__(self, index: int) -> tuple[int, str]:
        raise ConnectionError("the share is gone")


def loader(monkeypatch: pytest.MonkeyPatch) -> DataLoader[tuple[int, str]]:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    return DataLoader(WhoAndHow(), batch_size=None, num_workers=1, prefetch_factor=1, worker_init_fn=prepare_worker)  # type: ignore[arg-type]


@pytest.mark.skipif(sys.platform != "linux", reason="no other system tells who sent a signal")
@pytest.mark.parametrize("name", ["TERM", "USR1"])
def test_what_is_sent_to_the_whole_run_does_not_end_a_worker(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = iter(loader(monkeypatch))
    worker, parallelism = next(rows)
    assert worker != os.getpid()
    assert parallelism == "false"
    for _ in range(2):
        subprocess.run(["kill", f"-{name}", str(worker)], check=True)
    assert [pid for pid, _ in rows] == [worker] * 3


def test_its_parent_ends_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = iter(loader(monkeypatch))
    worker, _ = next(rows)
    [process] = rows._workers  # type: ignore[attr-defined]
    os.kill(worker, signal.SIGTERM)
    process.join(timeout=120)
    assert process.exitcode == 0


@pytest.mark.parametrize("told", [ConnectionResetError("Connection reset by peer"), EOFError()])
def test_a_worker_that_died_is_named_also_while_it_is_ending(told: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = iter(WorkerLoader(WhoAndHow(), batch_size=None, num_workers=1, worker_init_fn=prepare_worker))  # type: ignore[arg-type]
    worker, _ = next(rows)

    def receive(self: object) -> None:
        threading.Timer(0.3, os.kill, (worker, signal.SIGKILL)).start()
        raise told

    monkeypatch.setattr(torchs._MultiProcessingDataLoaderIter, "_get_data", receive)
    with pytest.raises(RuntimeError, match=rf"DataLoader worker \(pid.* {worker}\) (exited|is killed)"):
        next(rows)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_no_worker_died_of_is_said_as_it_is(num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_SECONDS_TO_END", 0.1)
    rows = iter(WorkerLoader(Unreadable(), batch_size=None, num_workers=num_workers))  # type: ignore[arg-type]
    with pytest.raises(ConnectionError, match="the share is gone"):
        next(rows)
