"""The time that is left is judged by whole batches, whose examples are done all at once."""

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
