"""What is done is kept: a file goes on, loses only a line that was half-written, and refuses other settings."""

import json
import logging

import pytest

from app.errors import ConfigError, DataError
from app.evaluation.journal import Journal
from app.evaluation.records import Decoded, Record, Score

SETTINGS = {"limit": 3, "exits": (1, 2)}
RECORDS = [
    Record("boolq", 0, "", (Score(1, "likelihood", {"acc": 1.0}),), chance=0.5, detail={"answer": 1}),
    Record("gsm8k", 4, "g", (Score(2, "early_exit", {"em": 0.0}, Decoded(3, 0.5, 2, 1, True)),), truncated=True),
    Record("boolq", 1, "", (), weight=2.0),
]


def _written(path, records=RECORDS):
    with Journal(path, SETTINGS) as journal:
        for record in records:
            journal.add(record)
    return path


def test_what_was_written_is_read(tmp_path):
    with Journal(_written(tmp_path / "j"), SETTINGS) as journal:
        assert [*journal.records.values()] == RECORDS
        assert [*journal.records] == [("boolq", 0), ("gsm8k", 4), ("boolq", 1)]


@pytest.mark.parametrize("lost", [1, 20])
def test_a_half_written_last_line_is_dropped_and_told(tmp_path, caplog, lost):
    path = _written(tmp_path / "j")
    path.write_bytes(path.read_bytes()[:-lost])
    with caplog.at_level(logging.INFO), Journal(path, SETTINGS) as journal:
        assert [*journal.records.values()] == RECORDS[:2]
        journal.add(RECORDS[2])
    assert "its last line was half-written" in caplog.text
    assert "going on behind 2 examples" in caplog.text
    assert path.read_text() == _written(tmp_path / "whole").read_text()


@pytest.mark.parametrize(
    "left", ['{"settings": {', '{"settings": {"limit": 9}}\n', '{"settings": {"limit": 9}}\n{"task']
)
def test_a_journal_that_was_killed_before_an_example_was_done_begins_anew(tmp_path, left):
    (path := tmp_path / "j").write_text(left)
    assert _written(path).read_text() == _written(tmp_path / "whole").read_text()


def test_a_journal_without_an_example_is_not_left_behind(tmp_path):
    with pytest.raises(KeyError), Journal(tmp_path / "j", SETTINGS):
        raise KeyError
    assert not (tmp_path / "j").exists()


def test_other_settings_are_refused_and_nothing_is_lost(tmp_path):
    before = _written(tmp_path / "j").read_text()
    message = r"output: got '.*j', allowed results of the same settings \(limit is 3 there and 4 now\); name another"
    with pytest.raises(ConfigError, match=message):
        Journal(tmp_path / "j", SETTINGS | {"limit": 4})
    with pytest.raises(ConfigError, match=r"\(new is None there and 1 now\)"):
        Journal(tmp_path / "j", SETTINGS | {"new": 1})
    assert (tmp_path / "j").read_text() == before
    (foreign := tmp_path / "foreign").write_text('{"question": "of a user"}')
    with pytest.raises(DataError, match="foreign, line 1: no record of an evaluation"):
        Journal(foreign, SETTINGS)
    assert foreign.read_text() == '{"question": "of a user"}'


def test_other_settings_begin_anew_only_where_that_was_asked_for(tmp_path):
    with Journal(_written(tmp_path / "j"), SETTINGS, overwrite=True) as journal:
        assert [*journal.records.values()] == RECORDS
    with Journal(tmp_path / "j", SETTINGS | {"limit": 4}, overwrite=True) as journal:
        assert not journal.records
        journal.add(RECORDS[0])
    with Journal(tmp_path / "j", SETTINGS | {"limit": 4}) as journal:
        assert [*journal.records.values()] == RECORDS[:1]


def test_a_file_that_another_process_writes_is_refused(tmp_path):
    with Journal(tmp_path / "j", SETTINGS), pytest.raises(ConfigError, match="that no other evaluation is writing"):
        Journal(tmp_path / "j", SETTINGS)


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (1, "3"),
        (1, "{}"),
        (5, "notes"),
        (2, "{"),
        (2, json.dumps({"task": "boolq"})),
        (3, json.dumps({"scores": [], "x": 1})),
    ],
)
def test_a_damaged_line_is_named(tmp_path, number, line):
    path = _written(tmp_path / "j")
    lines = path.read_text().split("\n")
    lines[number - 1] = line
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=rf"j, line {number}: no record of an evaluation .*; remove the file"):
        Journal(path, SETTINGS)


def test_what_is_done_is_on_the_disk_at_once(tmp_path):
    with Journal(tmp_path / "j", SETTINGS) as journal:
        journal.add(RECORDS[0])
        assert len((tmp_path / "j").read_text().splitlines()) == 2
