"""A file is written whole or not at all, by each verb that writes one a user may have had before."""

import json
import os
import threading
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from app.benchmark.report import write_report as write_benchmark
from app.topv2.evaluation import ParsePlan
from app.topv2.report import ParseReport
from app.topv2.report import write_report as write_parses
from app.whole_file import write_whole

PLAN = ParsePlan(
    num_layers=2,
    exit_layers=(1,),
    num_draft_tokens=(),
    max_new_tokens=2,
    eos_token_ids=(0,),
    batch_size=1,
    time_limit_seconds=1.0,
)
PARSES = ParseReport(stage="test", step=1, checkpoint=None, num_ranks=1, plan=PLAN, results=())
WRITERS = {
    "text": lambda file: write_whole(file, "new"),
    "bytes": lambda file: write_whole(file, b"new"),
    "benchmark": lambda file: write_benchmark({}, Figure(), file),
    "parses": lambda file: write_parses(PARSES, file),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_what_was_there_and_nothing_beside_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file.json"
    file.write_text("the one before")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as disk:
        disk.setattr("app.whole_file.os.fsync", full)
        with pytest.raises(OSError, match=rf"No space left.*{tmp_path}"):
            WRITERS[name](file)
        disk.setattr("app.whole_file.os.fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            WRITERS[name](file)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file.json": "the one before"}
    WRITERS[name](file)
    assert file.read_text() != "the one before"
    assert not list(tmp_path.glob(".*"))


def test_text_is_written_as_utf8(tmp_path: Path) -> None:
    write_whole(tmp_path / "file.json", json.dumps("é", ensure_ascii=False))
    assert (tmp_path / "file.json").read_bytes() == b'"\xc3\xa9"'


def test_a_link_and_a_mode_stay(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("the one before")
    target.chmod(0o600)
    link.symlink_to(target)
    write_whole(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o600


def test_what_is_no_file_is_written_into(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_whole(pipe, "new")
    reader.join(timeout=120)
    assert read == ["new"]
    assert pipe.is_fifo()
