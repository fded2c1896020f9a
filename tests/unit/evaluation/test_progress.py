"""The time that is left is judged by whole batches, whose examples are done all at once."""

import logging

import pytest

from app import progress_log
from app.evaluation.progress import Progress
from app.evaluation.records import Record
from app.evaluation.rows import Item
from app.evaluation.task import AnswerExample


def test_the_time_left_counts_whole_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress_log, "perf_counter", lambda: now[0])
    said: list[str] = []
    items = [Item(row, "", "file", AnswerExample("a prompt", ("x",))) for row in range(10)]
    shown = Progress({"gsm8k": items}, {("gsm8k", 9)}, said.append, batch_size=4)
    for first in (0, 4, 8):
        now[0] += 40.0
        for item in items[first : first + 4]:
            shown.count(Record("gsm8k", item.row, "", ()))
    assert said == [
        "gsm8k: 5 of 10 examples, 50 s left",
        "gsm8k: 9 of 10 examples, 10 s left",
        "gsm8k: 10 of 10 examples, 0 s left",
    ]


def test_work_that_is_given_up_takes_no_longer_than_its_limit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress_log, "perf_counter", lambda: now[0])
    log = progress_log.ProgressLog(logging.getLogger("x"), "own", total=1000, unit="texts", limit_seconds=90.0)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            now[0] += 40.0
            log.add(1, num_tokens=80)
    assert [record.getMessage() for record in caplog.records] == [
        "own: 1 of 1,000 texts, 2 tokens/s, 50 s left",
        "own: 2 of 1,000 texts, 2 tokens/s, 10 s left",
        "own: 3 of 1,000 texts, 2 tokens/s, 0 s left",
    ]
