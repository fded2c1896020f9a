"""`make soak`: what a run holds is counted rightly, and growth of any of it misses its target."""

import json
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from lightning.pytorch import Callback

from app.cli import soak
from tests.support.runs import curricula, make_data, make_module, make_trainer

CONFIG = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")


def test_handles_threads_memory_and_children_are_counted():
    before = soak.holdings()
    sockets, stop = socket.socketpair(), threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    memory = bytearray(b"x" * (64 << 20))
    after = soak.holdings()
    assert after["handles"] == before["handles"] + 2
    assert after["threads"] == before["threads"] + 1
    assert after["rss_mib"] == pytest.approx(before["rss_mib"] + 64, abs=8)
    with subprocess.Popen(
        [sys.executable, "-c", "print(input())"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert soak.holdings()["threads"] == after["threads"] + 1
        child.communicate(b"done\n")
    stop.set()
    thread.join()
    for end in sockets:
        end.close()
    assert len(memory) == 64 << 20


class Leak(Callback):
    """Keeps a file open at every step."""

    def __init__(self, folder):
        self.folder, self.files = folder, []

    def on_train_batch_end(self, *_):
        self.files.append((self.folder / "kept").open("w"))


@pytest.mark.parametrize("leaking", [False, True])
def test_a_handle_that_every_step_keeps_is_found(tmp_path, leaking):
    leak = Leak(tmp_path)
    log = soak.HoldingsLog(every_n_steps=3, output=str(tmp_path / "marks.json"))
    trainer = make_trainer(tmp_path, max_steps=12, callbacks=[*curricula(), *([leak] if leaking else []), log])
    trainer.fit(make_module(), datamodule=make_data(tmp_path))
    for file in leak.files:
        file.close()
    marks = json.loads((tmp_path / "marks.json").read_text())
    assert [mark["step"] for mark in marks] == [3, 6, 9, 12]
    results = soak.soak_results(marks, "command")
    assert results["soak_handles_growth"]["passed"] is not leaking
    assert results["soak_handles_growth"]["value"] == (9 if leaking else 0)
    assert results["soak_threads_growth"]["passed"]


@pytest.mark.parametrize(("last", "passed"), [(104, True), (106, False)])
def test_memory_is_the_last_mark_s_over_the_first_s(last, passed):
    marks = [
        {"step": step, "rss_mib": rss, "handles": 9, "threads": 3} for step, rss in ((1, 100), (2, 110), (3, last))
    ]
    result = soak.soak_results(marks, "command")["soak_memory_ratio"]
    assert (result["value"], result["passed"]) == (pytest.approx(last / 100), passed)


@pytest.mark.slow
def test_the_command_runs_and_writes_its_results(tmp_path):
    output = tmp_path / "build" / "soak.json"
    soak.measure_soak(num_steps=8, output=str(output), config=CONFIG)
    found = json.loads(output.read_text())
    assert [mark["step"] for mark in found["soak_memory_ratio"]["marks"]] == [2, 4, 6, 8]
