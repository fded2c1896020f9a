"""Data workers and signals: those of the run are not theirs, and their parent ends them."""

import os
import signal
import subprocess
import sys

import pytest
from torch.utils.data import DataLoader

from datamodules.data_workers import prepare_worker


class WhoAndHow:
    """Rows that tell of the process that makes them."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[int, str]:
        return os.getpid(), os.environ["TOKENIZERS_PARALLELISM"]


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
    process.join(timeout=20)
    assert process.exitcode == 0
